"""From a config to the parts of training: the one place where configs are unpacked.

What is built here takes arrays and keyword scalars and knows no config.
"""

import functools

import jax
from jax.sharding import NamedSharding
import numpy as np

from ism_jax import config as config_lib
from ism_jax.data import pool_loader
from ism_jax.method import loss_distance, wavelet
from ism_jax.models import sit, vae
from ism_jax.runtime import sharding
from ism_jax.sampling.sampler import Sampler
from ism_jax.training import optimizer, paired_pool, train_step


def make_model(config, num_classes: int) -> sit.SiT:
    """The network that the config describes."""
    return sit.SiT(num_classes=num_classes, **config.model)


def apply_model(model: sit.SiT, params, x, t, d, w, label) -> jax.Array:
    """The network as a function of parameters, as objectives and samplers call it."""
    return model.apply({'params': params}, x, t, d, w, label)


def make_optimizer(config):
    """AdamW as the config says."""
    rate = optimizer.learning_rate(
        peak=config.optimizer.learning_rate,
        schedule=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_steps,
        num_steps=config.train.steps,
    )
    return optimizer.adamw(
        rate,
        b1=config.optimizer.b1,
        b2=config.optimizer.b2,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
    )


def make_distance(config, source):
    """The distance of the losses: error -> values [B] and their parts."""
    if not config.wavelet.enabled:
        return loss_distance.squared_error
    options = dict(wavelet=config.wavelet.name, levels=config.wavelet.levels)
    weighting = config_lib.parse_weighting(config.wavelet.weighting)
    variance = None
    if weighting == 'equal_variance':
        random = np.random.default_rng(config.seed)
        chosen = random.permutation(len(source))[:2048].tolist()
        examples = np.stack([source.example(index, random) for index in chosen])
        variance = wavelet.target_band_variance(examples, **options)
    weights = wavelet.band_weights(
        weighting, image_shape=source.image_shape, band_variance=variance, **options
    )
    return functools.partial(loss_distance.wavelet_error, weights=weights, **options)


def compiled_step(config, source, mesh, shardings):
    """`train_step`, compiled for the mesh: (state, pool, seed_key) -> state, metrics.

    The state is donated.
    """
    model = make_model(config, len(source.class_names))
    step = functools.partial(
        train_step.train_step,
        apply=functools.partial(apply_model, model),
        objective=config_lib.make_objective(config, len(source.class_names)),
        distance=make_distance(config, source),
        tx=make_optimizer(config),
        accumulate=config.train.accumulate,
        target_decay=config.ema.target_decay,
        infer_decay=config.ema.infer_decay,
        ema_warmup=config.ema.warmup,
        num_steps=config.train.steps,
    )
    whole = sharding.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, pool_shardings(mesh), whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )


def pool_batches(config) -> int:
    """K, how many batches share a pool."""
    return config.transport.batches if config.transport.enabled else 1


def make_loader(config, source, *, batches: int) -> pool_loader.PoolLoader:
    """Pools of `batches` batches for this process."""
    # Without transport a pool is a batch, which shall be of all classes.
    grouped = config.data.classes_per_pool if config.transport.enabled else 0
    return pool_loader.PoolLoader(
        source,
        batches=batches,
        batch_size=config.train.batch_size,
        seed=config.seed,
        flip=config.data.flip,
        classes_per_pool=grouped,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
        retry_seconds=config.data.retry_seconds,
    )


def make_sampler(
    config, objective, apply, shape, *, batch_size: int, mesh=None
) -> Sampler:
    """Makes images; of latents through `data.autoencoder`, where there is one.

    Args:
      config: of the run.
      objective: what the network was trained with.
      apply: the network.
      shape: (H, W, C) of what the network makes.
      batch_size: how many are made at once.
      mesh: of the parameters; None for that of `checkpoint.load_run`, all devices of
        this process.
    """
    decode = None
    if config.data.autoencoder:
        mesh = sharding.local_mesh() if mesh is None else mesh
        decode = vae.make_decoder(
            config.data.autoencoder,
            mesh,
            config.data.latent_mean,
            config.data.latent_std,
        )
    return Sampler(objective, apply, shape, batch_size=batch_size, decode=decode)


def make_coupling(config, mesh, num_classes: int):
    """The compiled coupling of a pool, or None without transport."""
    options = config.transport
    if not options.enabled:
        return None
    # Here, because OTT takes two seconds to import and sampling does without.
    from ism_jax.transport import coupling

    fast = {}
    if config.data.classes_per_pool:
        # Twice as many and as large as a pool has by plan: chunks of a class may meet,
        # and pools straddle chunks.
        size = options.batches * config.train.batch_size
        chunk = -(-size // config.data.classes_per_pool)
        fast = dict(
            max_classes=min(2 * config.data.classes_per_pool, size),
            class_capacity=min(2 * chunk, size),
        )
    return jax.jit(
        functools.partial(
            coupling.couple_pool,
            mesh=mesh,
            method=options.method,
            per_class=options.per_class,
            num_classes=num_classes,
            epsilon=options.epsilon,
            max_iterations=options.max_iterations,
            tolerance=options.tolerance,
            **fast,
        )
    )


def pool_shardings(mesh) -> paired_pool.Pool:
    split = NamedSharding(mesh, sharding.POOL)
    return paired_pool.Pool(split, split, split, sharding.replicated(mesh))
