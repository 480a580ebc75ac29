"""Builds the parts of a run from its config; only this module unpacks configs.

`Experiment` builds each part once, when it is first used. The parts take arrays and
keyword scalars and know no config.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from ism_jax import objectives
from ism_jax.data import points, pool_loader, sources
from ism_jax.data.source import Source
from ism_jax.evaluation.sample_scorer import SampleScorer, score_settings
from ism_jax.interchange import autoencoder_weights
from ism_jax.method import loss_distance, random_streams, wavelet
from ism_jax.models import conditions, in_context, sit, unet
from ism_jax.runtime import sharding
from ism_jax.sampling.sampler import Sampler
from ism_jax.training import (
    checkpoint,
    optimizer,
    paired_pool,
    potentials_file,
    train_state,
    train_step,
)

BACKBONES = {'sit': sit.SiT, 'in_context': in_context.InContext, 'unet': unet.UNet}


class Experiment:
    """A config and its parts.

    Args:
      config: a validated config.
      mesh: the devices; by default those of the config.
      source: the data; by default those of the config.
      num_classes, image_shape: properties of the data, if it is not to be opened.
    """

    def __init__(
        self, config, *, mesh=None, source=None, num_classes=None, image_shape=None
    ):
        self.config = config
        given = dict(
            mesh=mesh, source=source, num_classes=num_classes, image_shape=image_shape
        )
        for name, value in given.items():
            if value is not None:
                setattr(self, name, value)

    @functools.cached_property
    def source(self) -> Source:
        """The data."""
        return make_source(self.config)

    @functools.cached_property
    def num_classes(self) -> int:
        """Number of classes of the data."""
        return len(self.source.class_names)

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the network's output."""
        return self.source.image_shape

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices, as axes `data` and `fsdp`."""
        return sharding.make_mesh(self.config.mesh.data, self.config.mesh.fsdp)

    @functools.cached_property
    def seed_key(self) -> jax.Array:
        """The run's key, on all devices."""
        return sharding.replicate(jax.random.key(self.config.seed), self.mesh)

    @functools.cached_property
    def model(self) -> conditions.ConditionedNetwork:
        """The network; on a mesh of devices its batch is split over it."""
        # A plan has an abstract mesh.
        mesh = self.mesh if isinstance(self.mesh, jax.sharding.Mesh) else None
        split = sharding.BatchSharding(mesh)
        return make_model(self.config, self.num_classes, batch_sharding=split)

    def apply(self, params, *inputs, **options) -> jax.Array:
        """The network as a function of its parameters and the inputs of `SiT`."""
        devices = self.model.batch_sharding.size
        padded = sharding.apply_padded(_applied(self.model), devices)
        return padded(params, *inputs, **options)

    def _apply_in_groups(self, params, *inputs, **options):
        """The network with the parameters of `sharding.group_copies`."""
        split = sharding.BatchSharding(self.mesh, ('fsdp',))
        apply = _applied(self.model.clone(batch_sharding=split))
        grouped = sharding.apply_in_groups(apply, self.mesh)
        return grouped(params, *inputs, **options)

    @functools.cached_property
    def objective(self):
        """The method."""
        return objectives.create(num_classes=self.num_classes, **self.config.objective)

    @functools.cached_property
    def optimizer(self):
        """AdamW with its schedule."""
        options = self.config.optimizer
        rate = optimizer.learning_rate(
            peak=options.learning_rate,
            schedule=options.schedule,
            warmup_steps=options.warmup_steps,
            num_steps=self.config.train.steps,
        )
        return optimizer.adamw(
            rate,
            b1=options.b1,
            b2=options.b2,
            eps=options.eps,
            weight_decay=options.weight_decay,
            clip_norm=options.clip_norm,
        )

    @functools.cached_property
    def distance(self):
        """The distance of the losses: error -> values [B] and their parts."""
        if not self.config.wavelet.enabled:
            return loss_distance.squared_error
        name, levels = self.config.wavelet.name, self.config.wavelet.levels
        weighting = wavelet.parse_weighting(self.config.wavelet.weighting)
        variance = None
        if weighting == 'equal_variance':
            random = np.random.default_rng(self.config.seed)
            chosen = random.permutation(len(self.source))[:2048].tolist()
            examples = np.stack([self.source.example(i, random) for i in chosen])
            variance = wavelet.target_band_variance(
                examples, wavelet=name, levels=levels
            )
        weights = wavelet.band_weights(weighting, levels=levels, band_variance=variance)
        return functools.partial(
            loss_distance.wavelet_error, weights=weights, wavelet=name, levels=levels
        )

    @property
    def pool_batches(self) -> int:
        """K, how many batches share a pool."""
        return self.config.transport.batches if self.config.transport.enabled else 1

    def init_state(self):
        """A fresh train state on the mesh, and its shardings."""
        key = jax.random.key(self.config.seed)
        key = random_streams.stream(key, random_streams.INIT, 0)
        return train_state.create(
            lambda: conditions.init_params(self.model, self.image_shape, key),
            self.optimizer,
            self.mesh,
            twin_ema=self.config.ema.twin,
        )

    def abstract_state(self) -> train_state.TrainState:
        """The shapes and shardings of a train state, for a mesh that cannot run."""
        return train_state.abstract(
            lambda: conditions.init_params(
                self.model, self.image_shape, jax.random.key(0)
            ),
            self.optimizer,
            self.mesh,
            twin_ema=self.config.ema.twin,
        )

    def abstract_pool(self) -> paired_pool.Pool:
        """The shapes and shardings of a pool."""
        shape = self.pool_batches, self.config.train.batch_size
        split = pool_shardings(self.mesh)
        array = jax.ShapeDtypeStruct
        return paired_pool.Pool(
            array((*shape, *self.image_shape), jnp.float32, sharding=split.data),
            array(shape, jnp.int32, sharding=split.labels),
            array(shape, jnp.int32, sharding=split.noise_index),
            array((), jnp.int32, sharding=split.number),
        )

    def lower_train_step(self) -> jax.stages.Lowered:
        """The train step on the mesh, ready to compile."""
        state = self.abstract_state()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = self.compile_train_step(shardings)
        return step.lower(state, self.abstract_pool(), key)

    def lower_programs(self) -> dict[str, jax.stages.Lowered]:
        """The programs of a run on the mesh, ready to compile, by name.

        The train step, the coupling of a pool if there is one on the devices, and the
        sampler, without the autoencoder, with the config's largest number of steps.
        """
        programs = {'train step': self.lower_train_step()}
        if self.coupling is not None and not self.is_semidiscrete:
            key = jax.eval_shape(lambda: jax.random.key(0))
            couple = jax.jit(self._couple)
            programs['coupling of a pool'] = couple.lower(self.abstract_pool(), key)
        sampler = self.make_sampler(decode=False)
        params = self.abstract_state().infer
        programs['sampler'] = sampler.lower(params, max(self.config.sample.steps))
        return programs

    def _couple(self, pool, key):
        """Pairs a pool's data with noise."""
        data = pool.data.reshape(-1, *self.image_shape)
        return self.coupling(data, pool.labels.reshape(-1), key)

    def compile_train_step(self, shardings):
        """`train_step` for the mesh: (state, pool, seed_key) -> state, metrics.

        The state is donated.
        """
        config = self.config
        in_groups = config.train.accumulate > 1 and self.mesh.shape['data'] > 1
        step = functools.partial(
            train_step.train_step,
            apply=self._apply_in_groups if in_groups else self.apply,
            groups=self.mesh if in_groups else None,
            objective=self.objective,
            distance=self.distance,
            tx=self.optimizer,
            accumulate=config.train.accumulate,
            target_decay=config.ema.target_decay,
            infer_decay=config.ema.infer_decay,
            ema_warmup=config.ema.warmup,
            num_steps=config.train.steps,
        )
        replicated = sharding.replicated(self.mesh)
        return jax.jit(
            step,
            in_shardings=(shardings, pool_shardings(self.mesh), replicated),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )

    def make_loader(self, batches: int | None = None) -> pool_loader.PoolLoader:
        """Pools of `batches` batches, by default `pool_batches`, for this process."""
        data = self.config.data
        # Without transport a pool is a batch, which should mix all classes.
        grouped = data.classes_per_pool if self.config.transport.enabled else 0
        return pool_loader.PoolLoader(
            self.source,
            batches=batches or self.pool_batches,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            flip=data.flip,
            classes_per_pool=grouped,
            pairing=self.pairing,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=data.num_threads,
            prefetch=data.prefetch,
            retry_seconds=data.retry_seconds,
        )

    def next_pool(self, loader: pool_loader.PoolLoader):
        """The loader's next pool on the devices, and the coupling's report."""
        return paired_pool.next_pool(loader, self.coupling, self.mesh, self.seed_key)

    @functools.cached_property
    def coupling(self):
        """The compiled coupling of a pool, or None without transport."""
        options = self.config.transport
        if not options.enabled:
            return None
        # Imported here: OTT takes two seconds to import, and sampling needs none.
        from ism_jax.transport import coupling, semidiscrete

        if self.is_semidiscrete:
            return jax.jit(
                semidiscrete.couple_pool, out_shardings=sharding.replicated(self.mesh)
            )

        fast, classes = {}, self.config.data.classes_per_pool
        if classes:
            # Twice the planned number of classes and three times their size: pools
            # straddle chunks, and up to three chunks of a class may meet in a pool.
            size = options.batches * self.config.train.batch_size
            chunk = -(-size // classes)
            fast = dict(
                max_classes=min(2 * classes, size), class_capacity=min(3 * chunk, size)
            )
        return jax.jit(
            functools.partial(
                coupling.couple_pool,
                mesh=self.mesh,
                method=options.method,
                per_class=options.per_class,
                num_classes=self.num_classes,
                epsilon=options.epsilon,
                max_iterations=options.max_iterations,
                tolerance=options.tolerance,
                **fast,
            )
        )

    @property
    def is_semidiscrete(self) -> bool:
        """Whether transport pairs noise with the whole data set."""
        options = self.config.transport
        return options.enabled and options.method == 'semidiscrete'

    @functools.cached_property
    def class_points(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For each class the indices of its data, and the data as points."""
        members = points.class_members(self.source)
        threads = self.config.data.num_threads
        return members, points.read_points(self.source, members, threads)

    def learn_potentials(self) -> tuple[np.ndarray, dict[str, float]]:
        """Potentials [N] of semidiscrete transport, and how good they are."""
        from ism_jax.transport import semidiscrete

        members, class_points = self.class_points
        key = jax.random.key(self.config.seed)
        by_class, report = semidiscrete.fit_potentials(
            class_points,
            random_streams.stream(key, random_streams.POTENTIALS, 0),
            samples_per_point=self.config.transport.samples_per_point,
        )
        potentials = np.empty(len(self.source), np.float32)
        potentials[np.concatenate(members)] = np.concatenate(by_class)
        return potentials, report

    @functools.cached_property
    def potentials(self) -> np.ndarray:
        """Potentials [N] of semidiscrete transport; a run restores its own."""
        return self.learn_potentials()[0]

    def restore_potentials(self, workdir, log) -> None:
        """Uses the potentials of the run in `workdir`, or learns and stores them."""
        if self.is_semidiscrete:
            settings = {
                'source': repr(self.source),
                'seed': self.config.seed,
                'samples_per_point': self.config.transport.samples_per_point,
            }
            self.potentials = potentials_file.load_or_learn(
                workdir, settings, self.learn_potentials, log
            )

    @functools.cached_property
    def pairing(self):
        """Chooses the data of a pool for its noise; None but for semidiscrete."""
        if not self.is_semidiscrete:
            return None
        from ism_jax.transport import semidiscrete

        members, class_points = self.class_points
        return semidiscrete.Pairing(
            class_points,
            members,
            self.potentials,
            image_shape=self.image_shape,
            seed_key=jax.random.key(self.config.seed),
        )

    def make_sampler(
        self, batch_size: int | None = None, *, decode: bool = True
    ) -> Sampler:
        """A sampler of images; latents are decoded if there is an autoencoder.

        Args:
          batch_size: samples made at once; by default `sample.batch_size`.
          decode: whether latents are decoded, if there is an autoencoder.
        """
        return Sampler(
            self.objective,
            self.apply,
            self.image_shape,
            batch_size=batch_size or self.config.sample.batch_size,
            decode=self.make_decoder() if decode else None,
        )

    def make_decoder(self):
        """The function from latents to images; None if there is no autoencoder."""
        data = self.config.data
        if not data.autoencoder:
            return None
        return autoencoder_weights.make_decoder(
            data.autoencoder, self.mesh, data.latent_mean, data.latent_std
        )

    def make_scorer(self, sampler: Sampler, cache_dir, log) -> SampleScorer | None:
        """Scores samples by a small classifier; None if the config disables scores."""
        if not self.config.scores.enabled:
            return None
        return SampleScorer(
            self.source,
            sampler,
            cache_dir=cache_dir,
            seed=self.config.seed,
            samples=self.config.scores.samples,
            log=log,
        )

    def score(self, scorer: SampleScorer, state, workdir, log) -> None:
        """Scores the inference EMA as `sample` says; writes `scores.json`."""
        score_settings(
            scorer,
            state.infer,
            trained_steps=int(state.step),
            steps=self.config.sample.steps,
            guidance=self.config.sample.guidance,
            samples=self.config.scores.samples,
            workdir=workdir,
            log=log,
        )

    def make_checkpointer(self, workdir, log) -> checkpoint.Checkpointer:
        """Saves and restores the run in a folder."""
        return checkpoint.Checkpointer(
            workdir,
            keep_last=self.config.checkpoint.keep_last,
            keep_best=self.config.checkpoint.keep_best,
            log=log,
        )

    def intervals(self) -> dict[str, int]:
        """Options of `loop.Intervals`."""
        return dict(
            end=self.config.train.steps,
            log=self.config.log.every,
            checkpoint=self.config.checkpoint.every,
            grid=self.config.log.grid_every,
        )

    def grid_options(self) -> dict:
        """Options of `loop.draw_grids`."""
        return dict(
            key=self._samples_key,
            num_classes=self.num_classes,
            steps=self.config.log.grid_steps,
            guidance=self.config.log.grid_guidance,
            columns=self.config.log.grid_columns,
        )

    def table_options(self) -> dict:
        """Options of `loop.draw_table`."""
        return dict(
            key=self._samples_key,
            num_classes=self.num_classes,
            steps=self.config.sample.steps,
            guidance=self.config.sample.guidance,
        )

    @property
    def _samples_key(self):
        """Key of the noise of grids and tables; it has its own random stream."""
        key = jax.random.key(self.config.seed)
        return random_streams.stream(key, random_streams.SAMPLES, 0)


def make_source(config) -> Source:
    """The data that the config names."""
    return sources.make_source(
        config.data.source,
        image_size=config.data.image_size,
        channels=config.data.channels,
        data_dir=config.data.dir,
        on_corrupt=config.data.on_corrupt,
        latent_mean=config.data.latent_mean,
        latent_std=config.data.latent_std,
        cache_dir=config.data.cache_dir,
    )


def make_model(config, num_classes: int, **options) -> conditions.ConditionedNetwork:
    """The network that the config describes; `options` are other attributes of it."""
    backbone = BACKBONES[config.model.backbone]
    # Each backbone has its own sizes.
    names = {field.name for field in dataclasses.fields(backbone)}
    options |= {name: v for name, v in config.model.items() if name in names}
    objective = objectives.create(num_classes=num_classes, **config.objective)
    if options['attention'] == 'auto' and objective.has_forward_derivative:
        options['attention'] = 'xla'  # cuDNN's has no forward-mode derivative.
    return backbone(num_classes=num_classes, **options)


def _applied(model):
    """A network as a function of its parameters and the inputs of `SiT`."""
    return lambda params, *inputs, **options: model.apply(
        {'params': params}, *inputs, **options
    )


def pool_shardings(mesh) -> paired_pool.Pool:
    """Shardings of a `Pool`: each batch is split over all devices."""
    split = NamedSharding(mesh, sharding.POOL)
    return paired_pool.Pool(split, split, split, sharding.replicated(mesh))
