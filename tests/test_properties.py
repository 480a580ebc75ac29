"""Every config trains, or is refused by name before anything is compiled."""

import os

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax import config as config_lib
from ism_jax import config_check, cost, experiment, objectives, train
from ism_jax.models import attention, conditions
from ism_jax.runtime import sharding
from ism_jax.training import optimizer, paired_pool, train_state

INTEGERS = (-(10**9), -1, 0, 1, 2, 3, 4, 7, 8, 12, 16, 28, 64, 10**6, 10**9, 10**18)
FLOATS = (
    float('nan'),
    float('inf'),
    -1.0,
    0.0,
    1e-30,
    1e-3,
    0.5,
    0.999,
    1.0,
    2.0,
    1e30,
)
TUPLES = ((), (0,), (-1,), (1,), (1, 2, 4), (3,), (10**9,), (0.5,), (float('nan'),))
WORDS = {
    'data.source': ('mnist', 'fashion_mnist', 'tfds:', 'folder:/no', 'latents:x', ''),
    'data.dir': ('/nowhere',),
    'data.autoencoder': ('', '/nowhere'),
    'data.on_corrupt': ('error', 'skip'),
    'model.step_embedding': tuple(conditions.STEP_EMBEDDINGS),
    'model.dtype': ('float32', 'bfloat16', 'float16'),
    'model.remat': tuple(conditions.REMAT_POLICIES),
    'model.attention': attention.IMPLEMENTATIONS,
    'model.backbone': tuple(experiment.BACKBONES),
    'model.guidance_embedding': tuple(conditions.GUIDANCE_EMBEDDINGS),
    'objective.consistency': ('bootstrap', 'derivative', 'difference'),
    'objective.step_draw': ('dyadic', 'ends', 'uniform'),
    'objective.bootstrap_split': ('half', 'random'),
    'objective.guidance_draw': ('grid', 'uniform', 'log_uniform'),
    'objective.guidance_target': ('unguided', 'guided'),
    'objective.interval': ('fixed', 'input'),
    'objective.tangent': ('boundary', 'head'),
    'objective.time_draw': ('uniform', 'logit_normal'),
    'optimizer.schedule': tuple(optimizer.SCHEDULES),
    'transport.method': ('permutation', 'row_sampling', 'semidiscrete', 'no'),
    'wavelet.name': ('haar', 'db2', 'bior1.3', 'sym4', 'gaus1'),
    'wavelet.weighting': ('equal', 'equal_variance', '1', '1,1,1,1', 'nan,1,1,1'),
    'objective.name': tuple(objectives.names()),
}  # fmt: skip


def _values(name, value):
    """Values of a field, good and bad."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.sampled_from(INTEGERS)
    if isinstance(value, float):
        return st.sampled_from(FLOATS)
    if isinstance(value, tuple):
        return st.sampled_from(TUPLES)
    return st.sampled_from((*WORDS.get(name, ()), 'nonsense', '', '\x00'))


def _small(method):
    config = config_lib.default()
    config_lib.with_argument(config, f'{method},runlocal')
    config.model.update(hidden_size=16, depth=2, num_heads=2)
    config.scores.enabled = False
    config.log.grid_every = 0
    return config


@st.composite
def changed(draw):
    """A method, and up to three fields of its small config with other values."""
    method = draw(st.sampled_from(objectives.names()))
    flat = config_lib.flatten(_small(method))
    names = draw(st.lists(st.sampled_from(sorted(flat)), max_size=3, unique=True))
    return method, {name: draw(_values(name, flat[name])) for name in names}


def _changed(method, changes):
    config = _small(method)
    for name, value in changes.items():
        section, _, field = name.rpartition('.')
        (config[section] if section else config)[field] = value
    return config.lock()


def _refused(error, changes):
    """An error names what was changed, or what it conflicts with."""
    message = str(error)
    names = [*changes, *(name.rpartition('.')[2] for name in changes)]
    names += ['guidance', 'steps']  # Fields of samples and of grids.
    assert any(name in message for name in names), f'{changes}: {message}'


def _trace(config):
    """All of training up to its compilation."""
    config_check.validate(config)
    config_check.check_devices(config, 1, 1)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, jax.devices()[:1])
    parts = experiment.Experiment(config, mesh=mesh)
    source, model, tx = parts.source, parts.model, parts.optimizer
    config_check.check_source(config, source)
    cost.check_memory(parts)
    parts.make_loader().close()

    def init():
        params = conditions.init_params(model, source.image_shape, jax.random.key(0))
        return train_state.TrainState(
            jnp.int32(0), params, tx.init(params),
            params if config.ema.twin else None, params, jnp.int32(0), jnp.int32(0),
        )  # fmt: skip

    shape = (parts.pool_batches, config.train.batch_size)
    pool = paired_pool.Pool(
        jax.ShapeDtypeStruct((*shape, *source.image_shape), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    state = jax.eval_shape(init)
    shardings = sharding.tree_shardings(state, mesh)
    step = parts.compile_train_step(shardings)
    after, metrics = jax.eval_shape(step, state, pool, jax.random.key(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics['loss'].shape == ()
    couple = parts.coupling
    if couple is not None:
        flat = jax.ShapeDtypeStruct(
            (shape[0] * shape[1], *source.image_shape), jnp.float32
        )
        labels = jax.ShapeDtypeStruct(flat.shape[:1], jnp.int32)
        found, _ = jax.eval_shape(couple, flat, labels, jax.random.key(0))
        assert found.shape == labels.shape


SETTINGS = dict(
    deadline=None, derandomize=True, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip


def _settings(examples):
    """`PROPERTIES=10` tries ten times as many configs."""
    factor = int(os.environ.get('PROPERTIES', 1))
    return hypothesis.settings(max_examples=examples * factor, **SETTINGS)


@_settings(25)
@hypothesis.given(changed())
def test_every_config_can_be_compiled_or_is_refused_by_name(made):
    method, changes = made
    try:
        _trace(_changed(method, changes))
    except ValueError as error:
        _refused(error, changes)


@_settings(4)
@hypothesis.given(changed())
def test_every_config_trains_two_steps_or_is_refused_by_name(tmp_path_factory, made):
    method, changes = made
    config = _changed(method, changes)
    with config.unlocked():
        config.train.steps = min(config.train.steps, 2)
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
        config.sample.batch_size = min(config.sample.batch_size, 64)
    try:
        state = train.train(config, tmp_path_factory.mktemp('any'))
    except ValueError as error:
        _refused(error, changes | {'train.steps': 2, 'optimizer.warmup_steps': 1})
        return
    assert int(state.step) == config.train.steps
    for leaf in jax.tree.leaves(state.params):
        assert np.isfinite(np.asarray(leaf)).all()
