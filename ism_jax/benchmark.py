"""Times a config's train step and its parts, as ratios within one run.

    python -m ism_jax.benchmark --config configs/quickstart.py --change model.unroll=1
    python -m ism_jax.benchmark --networks

The first tells what the parts of a step take, sampling, compilation and memory, which
share of the machine's ceiling (a large matrix product of the same type) is used, and
what changes of the config do. The second times the frozen networks around it, with
random weights: the autoencoder, and those that look at samples for a score.

The candidates take turns, round by round, so that a machine whose speed drifts slows
them all; what is printed are medians over the rounds, and the ratio to the first row
is the median of the rounds' ratios, with their interquartile range.
"""

from collections.abc import Callable, Sequence
import functools
import json
import time
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import optax

from ism_jax import config as config_lib
from ism_jax import cost, experiment
from ism_jax.data import sources
from ism_jax.method import loss_distance, time_grid
from ism_jax.models import dinov2, efficientnet_lite, inception, named_tensors, sit, vae
from ism_jax.runtime import command_line, files, provenance, sharding
from ism_jax.training import ema, paired_pool, train_state

# Fields outside data and mesh that change what a step is given.
DATA_OF_A_STEP = ('seed', 'train.batch_size', 'transport.batches', 'transport.enabled')


def take_turns(
    candidates: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one call that is not counted."""
    for run in candidates.values():
        jax.block_until_ready(run())
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - started)
    return seconds


def trees(config, source, mesh):
    """The optimizer, a fresh state and its shardings."""
    model = experiment.make_model(config, len(source.class_names))
    tx = experiment.make_optimizer(config)
    state, shardings = train_state.create(
        lambda: sit.init_params(model, source.image_shape, jax.random.key(0)),
        tx, mesh, twin_ema=config.ema.twin,
    )  # fmt: skip
    return tx, state, shardings


def stepper(config, source, mesh, pool, seed_key):
    """Train steps of a config.

    Returns:
      A function that takes one step, which keeps its own state; seconds that the step
      took to compile; and bytes that it takes on a device, where XLA tells.
    """
    _, state, shardings = trees(config, source, mesh)
    step = experiment.compiled_step(config, source, mesh, shardings)
    lowered = step.lower(state, pool, seed_key)
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    size = None
    if memory is not None:
        # What is donated is used again.
        size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held = [state]

    def run():
        held[0], metrics = compiled(held[0], pool, seed_key)
        return metrics

    return run, seconds, size


def parts_of_a_step(config, source, mesh, pool, seed_key) -> dict[str, Callable]:
    """Parts of a train step, each by itself."""
    tx, state, shardings = trees(config, source, mesh)
    model = experiment.make_model(config, len(source.class_names))
    distance = experiment.make_distance(config, source)
    batch = jax.jit(paired_pool.pool_batch)(pool, state.step, seed_key)

    def gradient_of(name, distance):
        """Of the loss of a method."""
        other = config.copy_and_resolve_references()
        with other.unlocked():
            if name != config.objective.name:
                other.objective = config_lib.objective_defaults(name)
        objective = config_lib.make_objective(other, len(source.class_names))

        def loss(params, target_params):
            return objective(
                functools.partial(experiment.apply_model, model), params, target_params,
                batch, seed_key, distance=distance, progress=0.5,
            )[0]  # fmt: skip

        target = state.target_params()
        gradient = jax.jit(jax.grad(loss), out_shardings=shardings.params)
        return functools.partial(gradient, state.params, target)

    def update(params, opt_state):
        # Of the parameters' own size and kind: only the time is of interest.
        updates, opt_state = tx.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def averages(params, target, infer):
        decays = (config.ema.target_decay, target), (config.ema.infer_decay, infer)
        return [ema.update(t, params, d) for d, t in decays if t is not None]

    error = jax.random.normal(jax.random.key(0), batch.data.shape)
    error = jax.device_put(error, batch.data.sharding)
    of_distance = jax.jit(jax.grad(lambda e: distance(e)[0].mean()))
    return {
        'gradient of the loss': gradient_of(config.objective.name, distance),
        'gradient of flow matching': gradient_of('flow_matching', loss_distance.squared_error),
        'distance and its gradient': functools.partial(of_distance, error),
        'optimizer': functools.partial(
            jax.jit(update), state.params, state.opt_state
        ),
        'averages': functools.partial(
            jax.jit(averages), state.params, state.target, state.infer
        ),
    }  # fmt: skip


def measure(config, rounds: int, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Times a config.

    Args:
      config: of a training.
      rounds: how often each candidate is timed.
      changes: 'field=value' each; the train step with that is timed beside. Fields that
        change the data of a step cannot be.

    Returns:
      `rows`, records with `name`, `milliseconds`, `ratio` to the train step and
      `spread`, the interquartile range of the ratio; and figures by name:
      `compile_seconds`, `bytes_per_device` (None where XLA does not tell),
      `images_per_second`, `flops_per_step`, `ceiling_tflops` of one device and
      `utilisation`, the share of the ceiling that the step's operations take.
    """
    config_lib.validate(config)
    source = sources.make_source(
        config.data.source, **config_lib.source_options(config)
    )
    num_classes = len(source.class_names)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    seed_key = jax.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
    batches = experiment.pool_batches(config)
    loader = experiment.make_loader(config, source, batches=batches)
    couple = experiment.make_coupling(config, mesh, num_classes)
    pool, _ = paired_pool.next_pool(loader, couple, mesh, seed_key)
    parts = (source, mesh, pool, seed_key)

    step, compile_seconds, size = stepper(config, *parts)
    candidates = {'train step': step}
    for change in changes:
        candidates[f'train step, {change}'] = stepper(changed(config, change), *parts)[
            0
        ]
    flow_matching = config.copy_and_resolve_references()
    with flow_matching.unlocked():
        flow_matching.objective = config_lib.objective_defaults('flow_matching')
        flow_matching.wavelet.enabled = False
        flow_matching.ema.twin = False
    candidates['flow matching step'] = stepper(flow_matching, *parts)[0]
    candidates |= parts_of_a_step(config, *parts)

    shape = pool.images.shape
    number = shape[0] * shape[1]
    if couple is not None:
        data = pool.images.reshape(number, *shape[2:])
        labels = pool.labels.reshape(number)
        candidates['transport of a pool'] = lambda: couple(data, labels, seed_key)
    candidates['input of a pool, waited for'] = lambda: next(loader).images
    unhidden = experiment.make_loader(config, source, batches=batches)

    def read():
        # Nothing of another pool was read ahead of time.
        unhidden.seek(unhidden.get_state()['next_pool'] + 1)
        return next(unhidden).images

    candidates['input of a pool, made'] = read
    candidates |= sampling(config, source, mesh)
    ceiling, ceiling_flops = matrix_product(config.model.dtype)
    candidates['matrix product'] = ceiling

    try:
        seconds = take_turns(candidates, rounds)
    finally:
        loader.close()
        unhidden.close()
    seconds = {
        name: np.asarray(values) / (batches if ' of a pool' in name else 1)
        for name, values in seconds.items()
    }
    first = seconds['train step']
    rows = [row(name, values, first) for name, values in seconds.items()]
    # Only the difference can be measured: a teacher has no step of its own.
    teacher = seconds['gradient of the loss'] - seconds['gradient of flow matching']
    place = [r['name'] for r in rows].index('gradient of flow matching') + 1
    rows.insert(place, row('their difference: teacher, distance', teacher, first))

    operations = cost.make_plan(config, mesh.size, num_classes).flops_per_step
    peak = ceiling_flops / seconds['matrix product']
    return {
        'rows': rows,
        'compile_seconds': compile_seconds,
        'bytes_per_device': size,
        'images_per_second': config.train.batch_size / float(np.median(first)),
        'flops_per_step': operations,
        'ceiling_tflops': float(np.median(peak)) / 1e12,
        'utilisation': float(np.median(operations / first / mesh.size / peak)),
    }


def changed(config, change: str):
    """The config with a field set otherwise.

    Raises:
      ValueError: no such field or value, or one that changes the data of a step.
    """
    other = config.copy_and_resolve_references()
    with other.unlocked():
        config_lib.set_field(other, change)
    field = change.partition('=')[0]
    if field.split('.')[0] in ('data', 'mesh') or field in DATA_OF_A_STEP:
        raise ValueError(
            f'--change {change}: the train steps share one pool, of which this changes '
            'the data; time another config'
        )
    config_lib.validate(other)
    return other


def sampling(config, source, mesh) -> dict[str, Callable]:
    """A batch of samples, at each number of steps of the config."""
    num_classes = len(source.class_names)
    model = experiment.make_model(config, num_classes)
    sampler = experiment.make_sampler(
        config, config_lib.make_objective(config, num_classes),
        functools.partial(experiment.apply_model, model), source.image_shape,
        batch_size=config.sample.batch_size, mesh=mesh,
    )  # fmt: skip
    params = sit.init_params(model, source.image_shape, jax.random.key(0))
    params = jax.device_put(params, sharding.replicated(mesh))
    many = np.arange(config.sample.batch_size) % num_classes

    def sample(steps):
        return [images for images, _ in sampler.batches(
            params, jax.random.key(0), many, guidance=config.sample.guidance[0],
            schedule=time_grid.dyadic_schedule(steps, sampler.base_steps),
        )]  # fmt: skip

    return {
        f'{len(many)} samples, {steps} step{"s" if steps > 1 else ""}': (
            functools.partial(sample, steps)
        )
        for steps in config.sample.steps
    }


def matrix_product(dtype: str):
    """A product of large matrices on one device, and its operations."""
    side = 2048 if jax.default_backend() == 'cpu' else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    return functools.partial(jax.jit(jnp.matmul), a, a), 2 * side**3


def row(name: str, seconds: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    ratio = seconds / first
    return {
        'name': name,
        'milliseconds': 1000 * float(np.median(seconds)),
        'ratio': float(np.median(ratio)),
        'spread': float(np.subtract(*np.percentile(ratio, [75, 25]))),
    }


def measure_networks(
    image_size: int, batch_size: int, dtype: str, rounds: int
) -> list[dict]:
    """Records of the frozen networks: `name`, `images_per_second`, `teraflops`.

    With random weights, on one device.

    Args:
      image_size: side of the images.
      batch_size: images at once.
      dtype: of the autoencoder's computation; the others compute in float32.
      rounds: how often each is timed.
    """
    autoencoder = vae.Autoencoder(vae.Config(), dtype=dtype)
    shape = (batch_size, *autoencoder.latent_shape(image_size))
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (batch_size, image_size, image_size, 3), np.uint8)
    images = jnp.asarray(pixels / 127.5 - 1, jnp.float32)
    latents = jnp.asarray(random.standard_normal(shape), jnp.float32)
    weights = autoencoder.init(jax.random.key(0))
    calls = {
        'autoencoder, encode': (autoencoder.encode, weights, images),
        'autoencoder, decode': (autoencoder.decode, weights, latents),
    }
    modules = {
        'Inception': inception.Inception(),
        'DINOv2 ViT-L/14': dinov2.Dinov2(dinov2.Config(1024, 24, 16)),
        'EfficientNet-Lite0': efficientnet_lite.EfficientNetLite0(),
    }
    for name, module in modules.items():
        params = named_tensors.abstract_params(module, pixels)
        params = jax.tree.map(lambda a: jnp.full(a.shape, 1e-3, a.dtype), params)
        apply = lambda p, x, module=module: module.apply({'params': p}, x)
        calls[name] = (apply, params, jnp.asarray(pixels))
    candidates = {
        name: functools.partial(jax.jit(function), *args)
        for name, (function, *args) in calls.items()
    }
    seconds = take_turns(candidates, rounds)
    return [
        {
            'name': name,
            'images_per_second': batch_size / float(np.median(seconds[name])),
            'teraflops': cost.count_flops(function, *args)
            / float(np.median(seconds[name])) / 1e12,
        }
        for name, (function, *args) in calls.items()
    ]  # fmt: skip


def format_networks(records: list[dict]) -> str:
    lines = [f'{"":24}{"images/s":>10}{"TFLOP/s":>10}']
    for r in records:
        lines.append(
            f'{r["name"]:24}{r["images_per_second"]:10.3g}{r["teraflops"]:10.3g}'
        )
    return '\n'.join(lines)


def format_measured(measured: dict[str, Any]) -> str:
    """The table and the figures below it."""
    lines = [f'{"":38}{"ms":>10}{"of a step":>12}{"+-":>8}']
    for r in measured['rows']:
        name = r['name'] + (', per step' if ' of a pool' in r['name'] else '')
        lines.append(
            f'{name:38}{r["milliseconds"]:10.2f}{r["ratio"]:12.4f}{r["spread"]:8.4f}'
        )
    size = measured['bytes_per_device']
    lines += [
        '',
        f'{measured["images_per_second"]:.1f} images/s; '
        f'{measured["flops_per_step"] / 1e12:.3g} TFLOP in a step, '
        f'{measured["utilisation"]:.1%} of the {measured["ceiling_tflops"]:.3g} '
        'TFLOP/s that a matrix product reaches on each device',
        f'compiled in {measured["compile_seconds"]:.1f} s; '
        + ('memory unknown' if size is None else f'{size / 2**30:.2f} GiB on a device'),
    ]
    return '\n'.join(lines)


def run_flags():
    """Does what the command line says."""
    device = jax.devices()[0].device_kind
    if FLAGS.networks:
        print(f'one {device}, medians of {FLAGS.rounds} rounds\n')
        records = measure_networks(
            FLAGS.image_size, FLAGS.batch_size, FLAGS.dtype, FLAGS.rounds
        )
        print(format_networks(records))
    elif FLAGS.config is not None:
        print(f'{jax.device_count()} x {device}, medians of {FLAGS.rounds} rounds\n')
        records = measure(FLAGS.config, FLAGS.rounds, FLAGS.change)
        print(format_measured(records))
    else:
        raise ValueError('give --config, whose training is timed, or --networks')
    if FLAGS.out:
        about = {'hardware': provenance.hardware(), 'jax': jax.__version__}
        about |= {'commit': provenance.commit(), 'rounds': FLAGS.rounds}
        text = json.dumps(about | {'measured': records}, indent=1)
        files.write_bytes(FLAGS.out, text.encode())


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file('config', None, 'Config file.', lock_config=True)
    flags.DEFINE_integer('rounds', 10, 'How often each candidate is timed.')
    flags.DEFINE_string('out', '', 'JSON file to write the records to.')
    flags.DEFINE_multi_string(
        'change', [], "'field=value': the train step with that is timed beside."
    )
    flags.DEFINE_bool('networks', False, 'Time the frozen networks instead.')
    flags.DEFINE_integer('image_size', 256, 'Of --networks.', lower_bound=8)
    flags.DEFINE_integer('batch_size', 8, 'Of --networks.', lower_bound=1)
    flags.DEFINE_enum(
        'dtype', 'float32', ('float32', 'bfloat16'), "Of the autoencoder's computation."
    )
    app.run(command_line.main(run_flags))
