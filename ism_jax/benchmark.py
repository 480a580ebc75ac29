r"""Times a config's train step and its parts, as ratios within one run.

    python -m ism_jax.benchmark --config configs/quickstart.py --change model.unroll=1
    python -m ism_jax.benchmark --networks
    python -m ism_jax.benchmark --record new.json --against old.json

The first command reports the time of a train step, of its parts, of sampling and of
compilation, the memory, the utilisation of the devices (relative to a large matrix
product of the same type), and the effect of changes to the config. The second times the
frozen networks with random weights: the autoencoder, and those that score samples. The
third prints the ratios of the figures of two files that `--out` here or `--plan_out` of
`ism_jax.train` wrote; `--against` also compares what the other commands measure.

All candidates are timed once per round, so that a drift in the machine's speed affects
them equally. Times are medians over the rounds. The ratio to the first row is the
median of the rounds' ratios, with their interquartile range.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import json
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ism_jax import config as config_lib
from ism_jax import config_check, cost, figure_ratios
from ism_jax.experiment import Experiment
from ism_jax.interchange import named_tensors
from ism_jax.models import dinov2, efficientnet_lite, inception, vae
from ism_jax.runtime import command_line, files, paths, provenance, traced_flops
from ism_jax.sampling import image_grid
from ism_jax.training import ema, paired_pool

# Fields outside data and mesh that change the data of a step.
DATA_FIELDS = ('seed', 'train.batch_size', 'transport.batches', 'transport.enabled')


def take_turns(
    candidates: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one untimed call."""
    for run in candidates.values():
        jax.block_until_ready(run())
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - started)
    return seconds


def measure(config, rounds: int, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Times a config.

    Args:
      config: config of a run.
      rounds: timings of each candidate.
      changes: 'field=value'; the train step with each change is timed too.

    Returns:
      See `report`.

    Raises:
      ValueError: a config or a change that cannot be timed.
    """
    config_check.validate(config)
    experiment = Experiment(config)
    with (
        contextlib.closing(experiment.make_loader()) as loader,
        contextlib.closing(experiment.make_loader()) as seeking_loader,
    ):
        pool, _ = experiment.next_pool(loader)
        step, compile_seconds, size = compile_step(experiment, pool)
        candidates = {'train step': step}
        for change in changes:
            changed_step, *_ = compile_step(
                variant(experiment, changed(config, change)), pool
            )
            candidates[f'train step, {change}'] = changed_step
        plain = variant(experiment, flow_matching(config))
        candidates['flow matching step'], *_ = compile_step(plain, pool)
        state, shardings = experiment.init_state()
        candidates |= parts_of_a_step(experiment, plain, state, shardings, pool)
        candidates |= parts_of_a_pool(experiment, pool, loader, seeking_loader)
        candidates |= sampling(experiment, state.infer)
        candidates['matrix product'], flops = matrix_product(config.model.dtype)
        seconds = take_turns(candidates, rounds)
    figures = {'compile_seconds': compile_seconds, 'bytes_per_device': size}
    return report(experiment, seconds, flops) | figures


def changed(config, change: str):
    """A copy of the config with one field changed.

    Raises:
      ValueError: no such field or value, or one that changes the data of a step.
    """
    other = config.copy_and_resolve_references()
    with other.unlocked():
        config_lib.set_field(other, change)
    field = change.partition('=')[0]
    if field.split('.')[0] in ('data', 'mesh') or field in DATA_FIELDS:
        raise ValueError(
            f'--change {change}: the train steps share one pool, and this field '
            'changes its data; time another config'
        )
    config_check.validate(other)
    return other


def flow_matching(config):
    """A copy of the config with flow matching as the method, for comparison."""
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.objective = config_lib.objective_defaults('flow_matching')
        other.wavelet.enabled = False
        other.ema.twin = False
    return other


def variant(experiment: Experiment, config) -> Experiment:
    """An experiment with another config, on the same devices and data."""
    return Experiment(config, mesh=experiment.mesh, source=experiment.source)


def compile_step(experiment: Experiment, pool):
    """The train step as a function without arguments that keeps its state.

    Returns:
      The function, the seconds that it took to compile, and its bytes per device, or
      None if XLA does not report them.
    """
    state, shardings = experiment.init_state()
    lowered = experiment.compile_train_step(shardings).lower(
        state, pool, experiment.seed_key
    )
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    size = None
    if memory is not None:
        # The outputs reuse the memory of the donated state.
        size = memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def run():
        nonlocal state
        state, metrics = compiled(state, pool, experiment.seed_key)
        return metrics

    return run, seconds, size


def parts_of_a_step(
    experiment: Experiment, plain: Experiment, state, shardings, pool
) -> dict[str, Callable]:
    """The parts of a train step, each as a function without arguments.

    `plain` is the experiment with flow matching.
    """
    config, tx = experiment.config, experiment.optimizer
    batch = jax.jit(paired_pool.pool_batch)(pool, state.step, experiment.seed_key)
    target = state.target_params()

    def gradient(method: Experiment):
        def loss(params, target):
            return method.objective(
                experiment.apply,
                params,
                target,
                batch,
                experiment.seed_key,
                distance=method.distance,
                progress=0.5,
            )[0]

        compiled = jax.jit(jax.grad(loss), out_shardings=shardings.params)
        return functools.partial(compiled, state.params, target)

    @jax.jit
    def distance_gradient(error):
        return jax.grad(lambda e: experiment.distance(e)[0].mean())(error)

    @jax.jit
    def optimizer(params, opt_state):
        # The parameters serve as gradients: only their shapes affect the time.
        updates, opt_state = tx.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def ema_updates(params, target, infer):
        decays = (config.ema.target_decay, target), (config.ema.infer_decay, infer)
        return [ema.update(t, params, d) for d, t in decays if t is not None]

    error = jax.random.normal(jax.random.key(0), batch.data.shape)
    error = jax.device_put(error, batch.data.sharding)
    params = state.params
    return {
        'gradient of the loss': gradient(experiment),
        'gradient of flow matching': gradient(plain),
        'distance and its gradient': functools.partial(distance_gradient, error),
        'optimizer': functools.partial(optimizer, params, state.opt_state),
        'EMA updates': functools.partial(
            ema_updates, params, state.target, state.infer
        ),
    }


def parts_of_a_pool(
    experiment: Experiment, pool, loader, seeking_loader
) -> dict[str, Callable]:
    """Transport and input of a pool, each as a function without arguments.

    `loader` prefetches pools, as in training; `seeking_loader` discards what it
    prefetched.
    """
    candidates = {}
    if experiment.pairing is not None:
        labels = np.asarray(pool.labels).reshape(-1)
        candidates['transport of a pool'] = functools.partial(
            experiment.pairing, 0, labels, np.zeros(labels.size, bool)
        )
    elif experiment.coupling is not None:
        data = pool.data.reshape(-1, *pool.data.shape[2:])
        labels = pool.labels.reshape(-1)
        candidates['transport of a pool'] = functools.partial(
            experiment.coupling, data, labels, experiment.seed_key
        )

    def read():
        seeking_loader.seek(seeking_loader.get_state()['next_pool'] + 1)
        return next(seeking_loader).images

    candidates['input of a pool, prefetched'] = lambda: next(loader).images
    candidates['input of a pool, not prefetched'] = read
    return candidates


def sampling(experiment: Experiment, params) -> dict[str, Callable]:
    """A batch of samples at each number of steps, as functions without arguments."""
    sampler, settings = experiment.make_sampler(), experiment.config.sample
    labels = np.arange(settings.batch_size) % experiment.num_classes

    def sample(steps):
        batches = sampler.batches(
            params,
            jax.random.key(0),
            labels,
            guidance=settings.guidance[0],
            schedule=steps,
        )
        return [images for images, _ in batches]

    return {
        f'{len(labels)} samples, {image_grid.step_count(steps)}': (
            functools.partial(sample, steps)
        )
        for steps in settings.steps
    }


def matrix_product(dtype: str) -> tuple[Callable, int]:
    """A product of large matrices on one device, and its FLOPs."""
    side = 2048 if jax.default_backend() == 'cpu' else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    return functools.partial(jax.jit(jnp.matmul), a, a), 2 * side**3


def report(
    experiment: Experiment, seconds: dict[str, list[float]], product_flops: int
) -> dict[str, Any]:
    """What `measure` returns, from the seconds of `take_turns`.

    Returns:
      `rows`, see `row`; and `images_per_second`, `flops_per_step`, `ceiling_tflops`,
      the TFLOP/s of a matrix product on one device, and `utilisation`, the fraction of
      it that a train step reaches. `measure` adds `compile_seconds` and
      `bytes_per_device`, None if unknown.
    """
    seconds = {
        name: np.asarray(values)
        / (experiment.pool_batches if ' of a pool' in name else 1)
        for name, values in seconds.items()
    }
    first = seconds['train step']
    rows = [row(name, values, first) for name, values in seconds.items()]
    # The teacher cannot be timed alone, so the difference measures it.
    flow_matching = 'gradient of flow matching'
    teacher = seconds['gradient of the loss'] - seconds[flow_matching]
    index = list(seconds).index(flow_matching) + 1
    rows.insert(index, row('their difference: teacher, distance', teacher, first))
    config, devices = experiment.config, experiment.mesh.size
    plan = cost.make_plan(config, devices, experiment.num_classes)
    flops = plan.flops_per_step
    ceiling = product_flops / seconds['matrix product']
    return {
        'rows': rows,
        'images_per_second': config.train.batch_size / float(np.median(first)),
        'flops_per_step': flops,
        'ceiling_tflops': float(np.median(ceiling)) / 1e12,
        'utilisation': float(np.median(flops / first / devices / ceiling)),
    }


def row(name: str, seconds: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    """The record of a candidate.

    Returns:
      `name`, `milliseconds`, `ratio` to the first row, and `spread`, the interquartile
      range of the ratio.
    """
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
    """Times the frozen networks, with random weights on one device.

    Args:
      image_size: side of the images.
      batch_size: images per call.
      dtype: dtype of the autoencoder's computation; the others compute in float32.
      rounds: timings of each network.

    Returns:
      Records with `name`, `images_per_second` and `teraflops`.
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
        params = named_tensors.abstract_params(module)
        params = jax.tree.map(lambda a: jnp.full(a.shape, 1e-3, a.dtype), params)
        apply = lambda p, x, module=module: module.apply({'params': p}, x)
        calls[name] = (apply, params, jnp.asarray(pixels))
    candidates = {
        name: functools.partial(jax.jit(function), *args)
        for name, (function, *args) in calls.items()
    }
    seconds = take_turns(candidates, rounds)
    records = []
    for name, (function, *args) in calls.items():
        median = float(np.median(seconds[name]))
        teraflops = traced_flops.count_flops(function, *args) / median / 1e12
        rate = {'images_per_second': batch_size / median, 'teraflops': teraflops}
        records.append({'name': name} | rate)
    return records


def format_networks(records: list[dict]) -> str:
    """The table of `measure_networks`."""
    lines = [f'{"":24}{"images/s":>10}{"TFLOP/s":>10}']
    for r in records:
        lines.append(
            f'{r["name"]:24}{r["images_per_second"]:10.3g}{r["teraflops"]:10.3g}'
        )
    return '\n'.join(lines)


def format_measured(measured: dict[str, Any]) -> str:
    """The table of `measure`, with the other figures below it."""
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
        f'{measured["flops_per_step"] / 1e12:.3g} TFLOP per step, '
        f'{measured["utilisation"]:.1%} of the {measured["ceiling_tflops"]:.3g} '
        'TFLOP/s that a matrix product reaches on each device',
        f'compiled in {measured["compile_seconds"]:.1f} s; '
        + ('memory unknown' if size is None else f'{size / 2**30:.2f} GiB per device'),
    ]
    return '\n'.join(lines)


def run_flags() -> None:
    """Runs the command."""
    against = None
    if FLAGS.against:
        against = figure_ratios.read(paths.local_path(FLAGS.against, '--against'))
    if FLAGS.record:
        if against is None:
            raise ValueError('--record is compared with --against FILE: give both')
        record = figure_ratios.read(paths.local_path(FLAGS.record, '--record'))
        print(figure_ratios.table(record, against))
        return
    out = paths.from_user(FLAGS.out, '--out') if FLAGS.out else None
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
        raise ValueError('give --config to time a run, or --networks')
    about = {'hardware': provenance.hardware(), 'jax': jax.__version__}
    about |= {'commit': provenance.commit(), 'rounds': FLAGS.rounds}
    record = about | {'measured': records}
    if against is not None:
        print('', figure_ratios.table(record, against), sep='\n')
    if out:
        files.write_bytes(out, json.dumps(record, indent=1).encode())


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    command_line.define_config_flag()
    flags.DEFINE_integer('rounds', 10, 'Timings of each candidate.')
    flags.DEFINE_string('out', '', 'JSON file to write the records to.')
    flags.DEFINE_string('against', '', 'JSON file to compare the figures with.')
    flags.DEFINE_string('record', '', 'JSON file to compare, instead of timing.')
    flags.DEFINE_multi_string(
        'change', [], "'field=value': also times the train step with this change."
    )
    flags.DEFINE_bool('networks', False, 'Time the frozen networks instead.')
    flags.DEFINE_integer('image_size', 256, 'Side for --networks.', lower_bound=8)
    flags.DEFINE_integer('batch_size', 8, 'Batch for --networks.', lower_bound=1)
    flags.DEFINE_enum(
        'dtype', 'float32', ('float32', 'bfloat16'), 'Dtype of the autoencoder.'
    )
    command_line.run(run_flags)
