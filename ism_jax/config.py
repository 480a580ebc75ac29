"""The configuration: every field with its default, and what values are allowed.

A config file (`configs/*.py`) starts from `default()`, changes what it is about and
says in its docstring what running it should give. `validate` refuses, before anything
is compiled, what could not work; its messages name the field, the value, what is
allowed and what to do.
"""

import ast
import difflib
import json
import math
from typing import Any

import ml_collections

from ism_jax import objectives
from ism_jax.method import time_grid, wavelet
from ism_jax.models import sit
from ism_jax.objectives import base
from ism_jax.training import optimizer


def default() -> ml_collections.ConfigDict:
    """The paper's method where it is stated, and our choices where it is not.

    Choices that the paper leaves open are marked "open". Figures beside them are
    Frechet distances in 1 / 4 steps where this choice alone was changed in
    `configs/ablation.py:ism`, which has 20.6 / 9.6 with the values given here
    (`results/choices.json`, `results/ladder.json`; standard errors are about 1.5 /
    0.8, so that most choices do not matter there).
    """
    c = ml_collections.ConfigDict()
    c.seed = 0

    c.data = ml_collections.ConfigDict()
    # 'mnist', 'fashion_mnist', 'tfds:NAME', 'folder:PATH', 'latents:PATH'
    c.data.source = 'mnist'
    c.data.dir = ''  # Where a source looks for its files; '' for its own default.
    c.data.image_size = 32
    c.data.channels = 1
    c.data.flip = False  # Random horizontal flips.
    c.data.on_corrupt = 'error'  # Or 'skip': counted, replaced by another image.
    # About so many classes share a pool of transport; 0: as chance has it.
    c.data.classes_per_pool = 0
    # Makes pictures of latents: folder, safetensors file or hub id; '' for none.
    c.data.autoencoder = ''
    # Of latents, per channel: (x - mean) / std; () for the autoencoder's one scale.
    c.data.latent_mean = ()
    c.data.latent_std = ()
    c.data.num_threads = 2
    c.data.prefetch = 2  # Pools made ahead of time.
    c.data.retry_seconds = 60.0  # Of an image that the file system cannot read.

    c.model = ml_collections.ConfigDict(sit.preset('XL/2'))
    c.model.mlp_ratio = 4.0
    c.model.dtype = 'float32'  # Of the computation; parameters are float32.
    c.model.remat = 'none'
    c.model.attention = 'auto'
    c.model.unroll = 1  # Layers per iteration of the scan.
    c.model.step_embedding = 'level'  # 'size' for methods that draw any step size.
    c.model.time_scale = 1000.0

    c.objective = objective_defaults('ism')

    c.wavelet = ml_collections.ConfigDict()
    c.wavelet.enabled = True  # False: squared error.
    c.wavelet.name = 'haar'  # Open: any wavelet of PyWavelets.
    c.wavelet.levels = 5
    # Open: a name, or weights 'a,b,..'. equal_variance 21.7 / 9.8, nested 22.5 / 11.9,
    # orthonormal_mean 59 / 33; squared error 19.1 / 9.2.
    c.wavelet.weighting = wavelet.DEFAULT_WEIGHTING

    c.transport = ml_collections.ConfigDict()
    c.transport.enabled = True
    c.transport.batches = 32  # K: the pool is K batches.
    c.transport.method = 'permutation'  # Or 'row_sampling'.
    # Open: False 39.4 / 20.4, see the README on its skew; no transport 25.2 / 11.4.
    c.transport.per_class = True
    # Open: in standard deviations of the cost. 0.02: 21.1 / 9.9, 0.5: 22.9 / 10.6.
    c.transport.epsilon = 0.1
    c.transport.max_iterations = 200
    c.transport.tolerance = 0.05  # L1 error of the marginals, which sum to 1.

    c.ema = ml_collections.ConfigDict()
    c.ema.twin = True  # False: `infer` makes the targets too.
    # 0.99: 22.8 / 12.0, 0.999: 437 / 431 (self-consistency is not learned).
    c.ema.target_decay = 0.95
    c.ema.infer_decay = 0.9999
    c.ema.warmup = True  # Of `infer`.

    c.optimizer = ml_collections.ConfigDict()  # Open; SiT's and SM's habit.
    c.optimizer.learning_rate = 1e-4
    c.optimizer.schedule = 'constant'
    c.optimizer.warmup_steps = 0
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 0.0  # 0 for no clipping.

    c.train = ml_collections.ConfigDict()
    c.train.steps = 800_000
    c.train.init_from = ''  # A folder of ism_jax.convert to start from; '' for none.
    c.train.batch_size = 256  # Global: over all devices and processes.
    c.train.accumulate = 1  # Parts of a batch whose gradients are averaged.
    c.train.max_skipped_in_row = 10  # Non-finite steps before the run stops.
    # A step that takes longer is reported, with what each thread does; 0: never.
    c.train.stuck_after_seconds = 1200.0

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # -1: all devices that `fsdp` leaves.
    c.mesh.fsdp = 1

    c.log = ml_collections.ConfigDict()
    c.log.every = 100  # Steps between scalars.
    c.log.parameters = True  # A table of all parameters at the start.
    c.log.grid_every = 10_000  # Steps between grids of fixed noise; 0 for none.
    c.log.grid_columns = 10
    c.log.grid_steps = (1, 4)
    c.log.grid_guidance = 1.0

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 10_000
    c.checkpoint.keep_last = 2
    c.checkpoint.keep_best = 1

    c.sample = ml_collections.ConfigDict()  # Of grids and scores alike.
    c.sample.steps = (1, 2, 4, 8, 128)
    c.sample.guidance = (0.0, 1.0, 2.5)
    c.sample.batch_size = 100

    c.scores = ml_collections.ConfigDict()
    c.scores.enabled = True  # Small classifier's Frechet distance and accuracy.
    c.scores.samples = 1000
    # Samples, in 4 steps without guidance, that rank a checkpoint by its Frechet
    # distance when it is saved; 0 ranks checkpoints by their mean loss.
    c.scores.checkpoint_samples = 0
    return c


def use_objective(config, name: str, **options) -> None:
    """Makes `config` train another method; options not given have their defaults.

    The parts that belong to iSM (wavelet distance, transport, twin EMA) are switched
    off, the network shows the step size as the method needs it, and sampling asks for
    guidance that the method offers.
    """
    config.objective = objective_defaults(name)
    config.objective.update(options)
    for part in (config.wavelet, config.transport):
        part.enabled = name == 'ism'
    config.ema.twin = name == 'ism'
    objective = make_objective(config, num_classes=1)
    config.model.update(objective.model_options)
    low, high = objective.guidance_range
    clip = lambda w: min(max(w, low), high)
    config.sample.guidance = tuple(sorted({clip(w) for w in config.sample.guidance}))
    config.log.grid_guidance = clip(config.log.grid_guidance)


def use_imagenet_latents(config, image_size: int) -> None:
    """Latents of sd-vae-ft-mse of ImageNet, made by `ism_jax.prepare_data`.

    With the computation as an accelerator wants it, and without what is for small data.
    """
    config.data.update(
        source=f'latents:/data/imagenet{image_size}', image_size=image_size // 8,
        channels=4, flip=True, autoencoder='stabilityai/sd-vae-ft-mse', num_threads=8,
    )  # fmt: skip
    # A pool of 8,192 would hold eight images of a class, too few for a coupling within
    # classes; so it has about 128 of each of 64 classes.
    config.data.classes_per_pool = 64
    config.model.update(dtype='bfloat16', remat='dots')
    config.scores.enabled = False


def with_argument(config, argument: str) -> ml_collections.ConfigDict:
    """Applies the argument of `configs/x.py:argument`.

    The name of a method trains that method instead (`use_objective`), that of a size,
    such as 'B/2', another network. 'runlocal' keeps
    the method and shrinks the rest to a minute on one CPU, with the digits that come
    with the installation. Both are given as 'shortcut,runlocal'.

    Raises:
      ValueError: another argument.
    """
    for part in filter(None, argument.split(',')):
        _apply_argument(config, part)
    return config


def _apply_argument(config, argument: str) -> None:
    if argument == 'runlocal':
        config.data.update(
            source='mnist', channels=1, image_size=32, autoencoder='',
            classes_per_pool=0, latent_mean=(), latent_std=(),
        )  # fmt: skip
        config.model.update(
            hidden_size=32, depth=2, num_heads=2, patch_size=8, dtype='float32',
            remat='none',
        )  # fmt: skip
        objective = make_objective(config, num_classes=1)
        config.train.update(batch_size=max(32, objective.min_batch), steps=20)
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 5)
        config.transport.batches = 4
        config.wavelet.levels = min(config.wavelet.levels, 5)
        config.log.update(every=5, grid_every=10)
        config.checkpoint.every = 10
        low, high = objective.guidance_range
        guidance = tuple(sorted({low, min(low + 1.0, high)}))
        config.sample.update(steps=(1, 2), guidance=guidance, batch_size=50)
        config.scores.update(samples=100, checkpoint_samples=0)
    elif argument in objectives.names():
        use_objective(config, argument)
    elif argument in sit.PRESETS:
        config.model.update(sit.preset(argument))
    else:
        raise ValueError(
            f"config argument {argument!r} is unknown; use 'runlocal', a method "
            f'({", ".join(objectives.names())}) or a size of the network '
            f'({", ".join(sit.PRESETS)})'
        )


# The rows of the paper's table after `sm`, each the row before and one part more.
PARTS = {
    '+intrinsic_guidance': 'intrinsic_guidance',
    '+interval': 'interval',
    '+wavelet': 'wavelet',
    '+sot': 'sot',
    'ism': 'twin_ema',
}
RUNGS = ('sm', *PARTS)
# Full iSM without one part. Without intrinsic guidance it trains SM's loss.
REMOVALS = tuple(f'ism-{part}' for part in PARTS.values())


def use_rung(config, recipe: str) -> None:
    """Makes `config`, of iSM, train a rung or a removal.

    Raises:
      ValueError: another name.
    """
    if recipe not in (*RUNGS, *REMOVALS):
        raise ValueError(
            f'recipe {recipe!r} is not one of {", ".join((*RUNGS, *REMOVALS))}'
        )
    if recipe == 'sm':
        use_objective(config, 'shortcut')
        return
    parts = list(PARTS.values())
    if recipe in PARTS:
        active = parts[: list(PARTS).index(recipe) + 1]
    else:
        active = [part for part in parts if recipe != f'ism-{part}']
    if 'intrinsic_guidance' in active:
        config.objective.guidance_interval = 0.3 if 'interval' in active else 0.0
    else:
        use_objective(config, 'shortcut')
    config.wavelet.enabled = 'wavelet' in active
    config.transport.enabled = 'sot' in active
    config.ema.twin = 'twin_ema' in active


# What may differ when a run is resumed: how long it goes on and what it shows.
RESUMABLE = (
    'train.steps',
    'train.max_skipped_in_row',
    'train.stuck_after_seconds',
    'data.num_threads',
    'data.prefetch',
    'data.dir',
    'data.on_corrupt',
    'data.autoencoder',
    'data.retry_seconds',
    'mesh',
    'log',
    'checkpoint',
    'sample',
    'scores',
    'model.remat',
    'model.attention',
    'model.unroll',
)


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Dotted name -> value, of every field."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f'{name}.{rest}': v for rest, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def to_json(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def from_json(text: str) -> ml_collections.ConfigDict:
    """Inverse of `to_json`; lists become tuples, as configs are written.

    Fields that an older version did not have get their defaults, which do what it did.
    """

    def restore(value):
        if isinstance(value, dict):
            return ml_collections.ConfigDict({k: restore(v) for k, v in value.items()})
        return tuple(value) if isinstance(value, list) else value

    given = restore(json.loads(text))
    config = default()
    config.objective = objective_defaults(given.objective.name)
    config.update(given)
    config.lock()
    return config


def differences(old, new) -> tuple[list[str], list[str]]:
    """Lines 'field: old -> new' for a resumed run: (allowed, refused)."""
    old, new = flatten(old), flatten(new)
    allowed, refused = [], []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        line = f'{name}: {old.get(name)!r} -> {new.get(name)!r}'
        free = any(name == f or name.startswith(f + '.') for f in RESUMABLE)
        (allowed if free else refused).append(line)
    return allowed, refused


def objective_defaults(name: str) -> ml_collections.ConfigDict:
    """`config.objective` of a method: its name and its options with their defaults."""
    return ml_collections.ConfigDict({'name': name, **objectives.options(name)})


def make_objective(config, num_classes: int) -> base.BaseObjective:
    """The objective that the config describes.

    Raises:
      ValueError: an unknown method, a field that is not one of its options, a value
        that the method refuses.
    """
    given = dict(config.objective)
    cls = objectives.load(given.pop('name'))
    allowed = objectives.options(config.objective.name)
    if given.keys() != allowed.keys():
        raise ValueError(
            f'objective.name = {config.objective.name!r} has the options '
            f'{sorted(allowed)}, but config.objective has {sorted(given)}; start from '
            f'config.objective = objective_defaults({config.objective.name!r})'
        )
    return cls(num_classes=num_classes, **given)


def set_field(config, change: str) -> None:
    """Sets a field as 'train.steps=100' says.

    Raises:
      ValueError: no such field, or a value of another kind than the field has.
    """
    name, equals, text = change.partition('=')
    flat = flatten(config)
    if not equals or name not in flat:
        near = difflib.get_close_matches(name, flat, 3)
        raise ValueError(
            f'{change!r} sets no field of the config; write field=value'
            + (f', with the field one of {", ".join(near)}' if near else '')
        )
    old = flat[name]
    try:
        value = text if isinstance(old, str) else ast.literal_eval(text)
        if isinstance(old, float) and not isinstance(value, bool):
            value = float(value)
    except (ValueError, SyntaxError, TypeError):
        value = None
    if type(value) is not type(old):
        raise ValueError(
            f'{name} = {text!r} must be a {type(old).__name__}, such as {old!r}'
        )
    config.update_from_flattened_dict({name: value})


def source_options(config) -> dict[str, Any]:
    """What `data.sources.make_source` takes besides the name."""
    return dict(
        image_size=config.data.image_size, channels=config.data.channels,
        data_dir=config.data.dir, on_corrupt=config.data.on_corrupt,
        latent_mean=config.data.latent_mean, latent_std=config.data.latent_std,
    )  # fmt: skip


def parse_weighting(text) -> str | list[float]:
    """A weighting's name, or the numbers of '1,2,3'."""
    try:
        return [float(part) for part in str(text).split(',')]
    except ValueError:
        return text


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, naming the field, where the config could not work."""
    c = config
    for name, value in flatten(c).items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int) and abs(part) >= 2**31:
                raise ValueError(f'{name} = {value} must be less than 2**31')
            if isinstance(part, float) and math.isnan(part):
                raise ValueError(f'{name} = {value} must be a number')
    _at_least(
        c,
        1,
        'data.image_size',
        'data.channels',
        'data.num_threads',
        'data.prefetch',
        'model.patch_size',
        'model.hidden_size',
        'model.depth',
        'model.num_heads',
        'model.unroll',
        'train.steps',
        'train.batch_size',
        'train.accumulate',
        'train.max_skipped_in_row',
        'mesh.fsdp',
        'log.every',
        'log.grid_columns',
        'checkpoint.every',
        'checkpoint.keep_last',
        'sample.batch_size',
        'transport.batches',
        'transport.max_iterations',
    )
    _at_least(
        c,
        0,
        'seed',
        'data.classes_per_pool',
        'optimizer.warmup_steps',
        'optimizer.weight_decay',
        'optimizer.clip_norm',
        'log.grid_every',
        'checkpoint.keep_best',
        'data.retry_seconds',
        'train.stuck_after_seconds',
        'scores.checkpoint_samples',
    )
    _positive(
        c,
        'model.mlp_ratio',
        'model.time_scale',
        'optimizer.learning_rate',
        'optimizer.eps',
        'transport.epsilon',
        'transport.tolerance',
    )
    _below_one(c, 'ema.target_decay', 'ema.infer_decay', 'optimizer.b1', 'optimizer.b2')
    _one_of(c, 'data.on_corrupt', ('error', 'skip'))
    _one_of(c, 'model.dtype', ('float32', 'bfloat16'))
    _one_of(c, 'model.remat', tuple(sit.REMAT_POLICIES))
    _one_of(c, 'model.attention', tuple(sit.ATTENTION_IMPLEMENTATIONS))
    _one_of(c, 'model.step_embedding', sit.STEP_EMBEDDINGS)
    _one_of(c, 'optimizer.schedule', optimizer.SCHEDULES)
    _one_of(c, 'transport.method', ('permutation', 'row_sampling'))
    sit.check_sizes(
        c.data.image_size,
        c.data.image_size,
        c.model.patch_size,
        c.model.hidden_size,
        c.model.num_heads,
    )
    if c.model.mlp_ratio * c.model.hidden_size < 1:
        raise ValueError(
            f'model.mlp_ratio = {c.model.mlp_ratio} of model.hidden_size = '
            f'{c.model.hidden_size} leaves nothing; 4.0 is usual'
        )
    if c.mesh.data < 1 and c.mesh.data != -1:
        raise ValueError(
            f'mesh.data = {c.mesh.data} must be at least 1, or -1 for all devices left'
        )
    if c.optimizer.warmup_steps >= c.train.steps:
        raise ValueError(
            f'optimizer.warmup_steps = {c.optimizer.warmup_steps} must be less than '
            f'train.steps = {c.train.steps}'
        )
    if c.data.autoencoder and not c.data.source.startswith('latents:'):
        raise ValueError(
            f'data.autoencoder = {c.data.autoencoder!r} decodes latents, but '
            f'data.source = {c.data.source!r} gives images; set it to '
            "'latents:PATH' (see ism_jax.prepare_data) or data.autoencoder to ''"
        )
    if c.data.source.startswith('latents:') and c.scores.enabled:
        raise ValueError(
            f'scores.enabled = True, but data.source = {c.data.source!r} has no images '
            'for the small classifier to learn from; set scores.enabled = False'
        )
    _validate_normalisation(c)
    objective = make_objective(c, num_classes=1)
    needed = objective.model_options.get('step_embedding', c.model.step_embedding)
    if c.model.step_embedding != needed:
        raise ValueError(
            f'model.step_embedding = {c.model.step_embedding!r} does not serve '
            f'objective.name = {c.objective.name!r}; set it to {needed!r}'
        )
    if objective.base_steps > 2**sit.MAX_LEVELS:
        raise ValueError(
            f'objective.base_steps = {objective.base_steps} must be at most '
            f'{2**sit.MAX_LEVELS}, the sizes that the network tells apart'
        )
    _validate_batch(c, objective)
    if c.wavelet.enabled:
        shape = (c.data.image_size, c.data.image_size, c.data.channels)
        weighting = parse_weighting(c.wavelet.weighting)
        variance = [1.0] * (1 + 3 * c.wavelet.levels)
        wavelet.band_weights(
            weighting,
            levels=c.wavelet.levels,
            image_shape=shape,
            wavelet=c.wavelet.name,
            band_variance=variance,
        )
    for number in (*c.sample.steps, *c.log.grid_steps):
        time_grid.dyadic_schedule(number, objective.base_steps)
    check_guidance(objective, (*c.sample.guidance, c.log.grid_guidance))
    if c.scores.enabled and c.scores.samples < 100:
        raise ValueError(
            f'scores.samples = {c.scores.samples} must be at least 100 for a Frechet '
            'distance; or set scores.enabled = False'
        )


def _validate_normalisation(c) -> None:
    mean, std = c.data.latent_mean, c.data.latent_std
    if not mean and not std:
        return
    given = f'data.latent_mean = {mean} and data.latent_std = {std}'
    if not c.data.source.startswith('latents:'):
        raise ValueError(
            f'{given} are of latents, but data.source = {c.data.source!r}; set both '
            'to ()'
        )
    if not len(mean) == len(std) == c.data.channels or not min(std) > 0:
        raise ValueError(
            f'{given} must have a number for each of the data.channels = '
            f'{c.data.channels}, the latter above 0; the manifest of the latents has '
            'them as channel_mean and channel_std'
        )


def _validate_batch(c, objective) -> None:
    """The official shortcut-models code lets these pass in silence."""
    size, parts = c.train.batch_size, c.train.accumulate
    multiple = objective.batch_multiple * parts
    smallest = objective.min_batch * parts
    given = f'train.batch_size = {size} (in train.accumulate = {parts} part(s))'
    if size < smallest:
        raise ValueError(
            f'{given} is too small: with fewer than {smallest} samples some step sizes '
            f'would never be trained; choose at least {smallest}, or give '
            'self-consistency a larger share in objective.batch_split'
        )
    if size % multiple:
        raise ValueError(
            f'{given} must be a multiple of {multiple}, so that it splits exactly as '
            f'the objective asks; choose {max(smallest, size // multiple * multiple)} '
            f'or {(size // multiple + 1) * multiple}'
        )


def check_guidance(objective: base.BaseObjective, values) -> None:
    """Raises ValueError for guidance strengths that the method does not offer."""
    low, high = objective.guidance_range
    for w in values:
        if not low <= w <= high:
            raise ValueError(
                f'guidance = {w} must lie in [{low:g}, {high:g}], the strengths that '
                'the method offers when sampling'
                + (f'; set sample.guidance and log.grid_guidance to {low:g}'
                   if low == high else '')
            )  # fmt: skip


def _get(config, name):
    for part in name.split('.'):
        config = config[part]
    return config


def _at_least(config, least, *names):
    for name in names:
        if not _get(config, name) >= least:
            raise ValueError(f'{name} = {_get(config, name)} must be at least {least}')


def _positive(config, *names):
    for name in names:
        value = _get(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f'{name} = {value} must be a positive number')


def _below_one(config, *names):
    for name in names:
        if not 0 <= _get(config, name) < 1:
            raise ValueError(f'{name} = {_get(config, name)} must lie in [0, 1)')


def _one_of(config, name, allowed):
    if _get(config, name) not in allowed:
        raise ValueError(
            f'{name} = {_get(config, name)!r} must be one of '
            + ', '.join(map(repr, allowed))
        )
