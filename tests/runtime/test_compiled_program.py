"""What is read from compiled programs: from texts by hand, and from XLA on the CPU."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from ism_jax.runtime import compiled_program, sharding

PROGRAMS = Path(__file__).parent.parent / 'fixtures' / 'programs'

# A loop of 28 layers as on a TPU: the trip count is in the condition, a product is a
# convolution, an all-gather is repeated by the fusions that overlap with it, one array
# is in a cache (`S(1)`), and an all-reduce is fused with a slice of its result.
TPU = (PROGRAMS / 'tpu_loop.txt').read_text()


def _by_key(program):
    return {(c.kind, c.content): c for c in program.collectives}


def test_a_loop_on_a_tpu_counts_as_often_as_it_runs():
    program = compiled_program.read_text(TPU, [(28, 8, 16)])
    assert program.unknown_loops == 0
    assert program.flops == 28 * 2 * 32 * 16 * 8
    (product,) = [o for o in program.operations if o.flops]
    assert product.source.endswith('dot_general') and product.times == 28
    assert product.bytes == 28 * 2 * (8 * 16 + 32 * 16)  # `x` is in a cache.
    (layer,) = [o for o in program.operations if o.name == 'layer']
    assert layer.bytes == 28 * 2 * 2 * 8 * 4  # One layer, not the stack.
    assert program.cycles_by_part() == {'MLP products': 0.75, 'copies': 0.25}


def test_collectives_have_a_kind_a_content_and_bytes():
    program = compiled_program.read_text(TPU, [(28, 8, 16)])
    found = _by_key(program)
    assert found.keys() == {
        ('all-gather', 'parameters'),
        ('reduce-scatter', 'gradients'),
        ('all-to-all', 'activations'),
    }
    gathered = found['all-gather', 'parameters']
    assert (gathered.count, gathered.dtype) == (28, 'bf16')  # Not once per fusion.
    assert gathered.bytes == 28 * 2 * 8 * 16
    assert gathered.wire_bytes == gathered.bytes * 3 / 4
    scattered = found['reduce-scatter', 'gradients']
    assert (scattered.count, scattered.bytes, scattered.wire_bytes) == (1, 512, 384)
    assert program.collective_bytes('all-to-all') == 28 * 2 * 32 * 16
    assert program.collective_bytes(content='parameters') == gathered.bytes
    assert program.collective_count() == 57


@pytest.mark.parametrize(
    'groups, members',
    [
        ('{{0,1,2,3},{4,5,6,7}}', 4),
        ('[4,2]<=[8]', 2),
        ('[2,4]<=[4,2]T(1,0)', 4),
        ("mesh['data'=4,'fsdp'=2] {'data','fsdp'}", 8),
        ("mesh['axis_0'=16] {'axis_0':(1)4}", 4),
    ],
)
def test_group_sizes_in_all_notations(groups, members):
    text = TPU.replace('replica_groups=[2,4]<=[8]', f'replica_groups={groups}')
    found = _by_key(compiled_program.read_text(text))['all-to-all', 'activations']
    assert found.wire_bytes == round(found.bytes * (members - 1) / members)


def test_a_batch_of_products_is_counted_without_its_padding():
    """A TPU writes attention as a convolution dilated by the batch and the heads."""
    text = (PROGRAMS / 'tpu_attention.txt').read_text()
    program = compiled_program.read_text(text)
    assert program.flops == 2 * 16 * 12 * 256 * 256 * 64


def test_a_library_call_of_a_gpu_is_a_product():
    text = (PROGRAMS / 'gpu_product.txt').read_text()
    assert compiled_program.read_text(text).flops == 2 * 64 * 32 * 128


def test_arrays_that_a_gpu_joins_are_told_apart():
    text = (PROGRAMS / 'gpu_sums.txt').read_text()
    program = compiled_program.read_text(text, [(16, 8)])
    found = _by_key(program)
    assert found['all-reduce', 'gradients'].bytes == 2 * 128
    assert found['all-reduce', 'activations'].bytes == 2 * 6
    # An update of one row of a stack, beside other work.
    (update,) = [o for o in program.operations if o.name == 'fusion-start']
    assert update.bytes == 2 * 2 * 128 + 4  # And the index.


def test_the_part_of_a_parameter_on_a_chip_is_recognised(eight_devices):
    """Where gradients are summed within a group first, only parts cross groups."""
    split = NamedSharding(sharding.make_mesh(4, 2), P('fsdp'))
    params = {'kernel': jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=split)}
    shapes = compiled_program.parameter_shapes(params)
    assert shapes == {(32, 8), (16, 8)}
    text = (PROGRAMS / 'gpu_sums.txt').read_text()
    found = _by_key(compiled_program.read_text(text, shapes))
    assert found['all-reduce', 'gradients'].bytes == 2 * 128


@pytest.mark.parametrize(
    'source, part',
    [
        ('blocks/mlp_in/checkpoint/dot_general', 'MLP products'),
        ('blocks/qkv/checkpoint/dot_general', 'qkv and projection products'),
        ('blocks/vmap(BTNH,BSNH->BNTS)/dot_general', 'attention scores and values'),
        ('blocks/LayerNorm_0/reduce_sum', 'other work of the blocks'),
    ],
)
def test_operations_are_told_apart_by_their_names_in_the_program(source, part):
    source = f'jit(train_step)/jvp(SiT)/while/body/eval_jaxpr/checkpoint/{source}'
    operation = compiled_program.Operation('fusion', source, 28, 0, 0, cycles=7)
    program = compiled_program.Program({}, [operation], [], 0)
    assert program.cycles_by_part() == {part: 1.0}


@functools.cache
def _layers_with_sums():
    """Five layers on 8 devices, each with a product and an all-reduce of the mean."""
    mesh = sharding.make_mesh(4, 2)

    def layer(x, w):
        x = jnp.tanh(x @ w)
        return x - jax.lax.psum(x.sum(0, keepdims=True), 'data'), None

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P('data'), P()), out_specs=P('data')
    )
    def apply(x, stack):
        return jax.lax.scan(layer, x, stack)[0]

    x = jax.ShapeDtypeStruct(
        (64, 32), jnp.float32, sharding=NamedSharding(mesh, P('data'))
    )
    stack = jax.ShapeDtypeStruct(
        (5, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P())
    )
    return jax.jit(apply).lower(x, stack).compile()


def test_a_scan_compiled_for_cpus(eight_devices):
    compiled = _layers_with_sums()
    program = compiled_program.read(compiled, [(5, 32, 32)])
    assert program.flops == 5 * 2 * 16 * 32 * 32
    (total,) = program.collectives
    assert (total.kind, total.content, total.dtype) == (
        'all-reduce',
        'activations',
        'f32',
    )
    assert (total.count, total.bytes) == (5, 5 * 32 * 4)
    assert total.wire_bytes == 2 * total.bytes * 3 / 4
    # XLA counts one layer.
    assert compiled.cost_analysis()['flops'] < 2 * program.flops / 5
    stack, x = 5 * 32 * 32 * 4, 16 * 32 * 4
    assert program.memory['arguments'] == stack + x
    assert (
        program.memory['peak']
        >= program.memory['arguments'] + program.memory['outputs']
    )
    assert program.bytes > 2 * stack


def test_a_loop_that_stops_by_itself_is_reported():
    def halve(x):
        return jax.lax.while_loop(lambda y: y.sum() > 1, lambda y: y @ y, x)

    compiled = jax.jit(halve).lower(jnp.ones((8, 8))).compile()
    program = compiled_program.read(compiled)
    assert program.unknown_loops == 1 and program.flops == 2 * 8**3
