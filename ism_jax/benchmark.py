"""Times a config's train step and its parts, as ratios within one run.

    python -m ism_jax.benchmark --config configs/quickstart.py
    python -m ism_jax.benchmark --networks

The second times the frozen networks around it, with random weights: the autoencoder,
and those that look at samples for a score.

The candidates take turns, round by round, so that a machine whose speed drifts slows
them all; what is printed are medians over the rounds, and the ratio to the first row
is the median of the rounds' ratios.
"""

from collections.abc import Callable
import functools
import json
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from ism_jax import build
from ism_jax import command_line
from ism_jax import config as config_lib
from ism_jax import files
from ism_jax import flops
from ism_jax import schedule
from ism_jax import sharding
from ism_jax import train
from ism_jax import train_state
from ism_jax.data import sources
from ism_jax.models import dinov2
from ism_jax.models import efficientnet_lite
from ism_jax.models import inception
from ism_jax.models import named_tensors
from ism_jax.models import sit
from ism_jax.models import vae


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


def stepper(config, source, mesh, pool, seed_key):
    """A function that takes one train step of the config; it keeps its own state."""
    num_classes = len(source.class_names)
    model = build.make_model(config, num_classes)
    state, shardings = train_state.create(
        lambda: sit.init_params(model, source.image_shape, jax.random.key(0)),
        build.make_optimizer(config),
        mesh,
        twin_ema=config.ema.twin,
    )
    step = build.compiled_step(config, source, mesh, shardings)
    held = [state]

    def run():
        held[0], metrics = step(held[0], pool, seed_key)
        return metrics

    return run


def measure(config, rounds: int) -> list[dict]:
    """Records with `name`, `milliseconds`, `ratio` to the train step, and `spread`."""
    config_lib.validate(config)
    source = sources.make_source(
        config.data.source, **config_lib.source_options(config)
    )
    num_classes = len(source.class_names)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    seed_key = jax.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
    batches = build.pool_batches(config)
    loader = build.make_loader(config, source, batches=batches)
    couple = build.make_coupling(config, mesh, num_classes)
    pool, _ = train.next_pool(loader, couple, mesh, seed_key)

    flow_matching = config.copy_and_resolve_references()
    with flow_matching.unlocked():
        flow_matching.objective = config_lib.objective_defaults('flow_matching')
        flow_matching.wavelet.enabled = False
    pixel = config.copy_and_resolve_references()
    pixel.wavelet.enabled = False
    candidates = {
        'train step': stepper(config, source, mesh, pool, seed_key),
        'train step, squared error': stepper(pixel, source, mesh, pool, seed_key),
        'flow matching step': stepper(flow_matching, source, mesh, pool, seed_key),
    }

    error = jax.random.normal(
        jax.random.key(0), (config.train.batch_size, *source.image_shape)
    )
    distance = build.make_distance(config, source)
    gradient = jax.jit(jax.grad(lambda e: distance(e)[0].mean()))
    candidates['distance and its gradient'] = functools.partial(gradient, error)
    shape = pool.images.shape
    size = shape[0] * shape[1]
    if couple is not None:
        data = pool.images.reshape(size, *shape[2:])
        labels = pool.labels.reshape(size)
        candidates['transport of a pool'] = lambda: couple(data, labels, seed_key)
    candidates['input of a pool'] = lambda: next(loader).images

    model = build.make_model(config, num_classes)
    sampler = build.make_sampler(
        config, config_lib.make_objective(config, num_classes),
        functools.partial(build.apply_model, model), source.image_shape,
        batch_size=config.sample.batch_size,
    )  # fmt: skip
    params = sit.init_params(model, source.image_shape, jax.random.key(0))
    many = np.arange(config.sample.batch_size) % num_classes

    def sample(steps):
        return [images for images, _ in sampler.batches(
            params, jax.random.key(0), many, guidance=0.0,
            schedule=schedule.dyadic_schedule(steps, sampler.base_steps),
        )]  # fmt: skip

    for steps in (1, 4):
        name = f'{len(many)} samples in {steps} step{"s" if steps > 1 else ""}'
        candidates[name] = functools.partial(sample, steps)

    seconds = take_turns(candidates, rounds)
    first = np.asarray(seconds['train step'])
    records = []
    for name, values in seconds.items():
        values = np.asarray(values)
        if name.endswith('of a pool'):
            name, values = f'{name}, per step', values / batches
        records.append(
            {
                'name': name,
                'milliseconds': 1000 * float(np.median(values)),
                'ratio': float(np.median(values / first)),
                'spread': float(np.subtract(*np.percentile(values / first, [75, 25]))),
            }
        )
    return records


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
            'teraflops': flops.count(function, *args)
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


def format_records(records: list[dict]) -> str:
    lines = [f'{"":34}{"ms":>10}{"of a step":>12}{"+-":>8}']
    for r in records:
        lines.append(
            f'{r["name"]:34}{r["milliseconds"]:10.2f}{r["ratio"]:12.3f}{r["spread"]:8.3f}'
        )
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
        records = measure(FLAGS.config, FLAGS.rounds)
        print(format_records(records))
    else:
        raise ValueError('give --config, whose training is timed, or --networks')
    if FLAGS.out:
        text = json.dumps({'device': device, 'records': records}, indent=1)
        files.write_bytes(FLAGS.out, text.encode())


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file('config', None, 'Config file.', lock_config=True)
    flags.DEFINE_integer('rounds', 10, 'How often each candidate is timed.')
    flags.DEFINE_string('out', '', 'JSON file to write the records to.')
    flags.DEFINE_bool('networks', False, 'Time the frozen networks instead.')
    flags.DEFINE_integer('image_size', 256, 'Of --networks.', lower_bound=8)
    flags.DEFINE_integer('batch_size', 8, 'Of --networks.', lower_bound=1)
    flags.DEFINE_enum(
        'dtype', 'float32', ('float32', 'bfloat16'), "Of the autoencoder's computation."
    )
    app.run(command_line.main(run_flags))
