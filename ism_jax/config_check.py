"""Validates a config, once, before anything is compiled.

`validate` needs the config alone. `check_devices`, `check_source` and `check_resume`
compare it with the machine, the data and the run that it resumes. Each raises one
ValueError that names the field, its value, what is allowed and what to do.
"""

from collections.abc import Iterator
import math

from ism_jax import config as config_lib
from ism_jax import objectives
from ism_jax.evaluation import sample_scorer
from ism_jax.method import time_grid, wavelet
from ism_jax.models import attention, conditions, sit
from ism_jax.objectives import alpha_flow
from ism_jax.runtime import paths, sharding
from ism_jax.training import optimizer, writers


def _at_least(low):
    return f'at least {low}', lambda v: v >= low


def _one_of(*values):
    return 'one of ' + ', '.join(map(repr, values)), lambda v: v in values


_POSITIVE = 'a positive number', lambda v: v > 0 and math.isfinite(v)
_FRACTION = 'in [0, 1)', lambda v: 0 <= v < 1
_POWER_OF_TWO = (
    f'a power of two from 2 to {2**conditions.MAX_LEVELS}, such as 128: steps are '
    'halved',
    lambda v: v <= 2**conditions.MAX_LEVELS and time_grid.is_base_steps(v),
)

# Field -> (what is allowed, predicate).
RULES = {
    'seed': _at_least(0),
    'data.image_size': _at_least(1),
    'data.channels': _at_least(1),
    'data.on_corrupt': _one_of('error', 'skip'),
    'data.classes_per_pool': _at_least(0),
    'data.num_threads': _at_least(1),
    'data.prefetch': _at_least(1),
    'data.retry_seconds': _at_least(0),
    'model.backbone': _one_of('sit', 'in_context', 'unet'),
    'model.patch_size': _at_least(1),
    'model.hidden_size': (
        'at least 4 and a multiple of 4, for the 2-D sin-cos positions',
        lambda v: v >= 4 and v % 4 == 0,
    ),
    'model.depth': _at_least(1),
    'model.num_heads': _at_least(1),
    'model.mlp_ratio': _POSITIVE,
    'model.channel_multipliers': (
        'one to eight integers from 1 to 64, such as (1, 2, 2)',
        lambda v: (
            1 <= len(v) <= 8 and all(isinstance(m, int) and 1 <= m <= 64 for m in v)
        ),
    ),
    'model.blocks_per_level': ('in 1 .. 64', lambda v: 1 <= v <= 64),
    'model.attention_levels': _at_least(0),
    'model.dtype': _one_of('float32', 'bfloat16'),
    'model.remat': _one_of(*conditions.REMAT_POLICIES),
    'model.attention': _one_of(*attention.IMPLEMENTATIONS),
    'model.unroll': _at_least(1),
    'model.step_embedding': _one_of(*conditions.STEP_EMBEDDINGS),
    'model.time_scale': _POSITIVE,
    'model.velocity_head': _at_least(0),
    'model.guidance_embedding': _one_of(*conditions.GUIDANCE_EMBEDDINGS),
    'wavelet.levels': _at_least(1),
    'transport.batches': _at_least(1),
    'transport.method': _one_of('permutation', 'row_sampling', 'semidiscrete'),
    'transport.epsilon': _POSITIVE,
    'transport.max_iterations': _at_least(1),
    'transport.tolerance': _POSITIVE,
    'transport.samples_per_point': _at_least(1),
    'ema.target_decay': _FRACTION,
    'ema.infer_decay': _FRACTION,
    'optimizer.learning_rate': _POSITIVE,
    'optimizer.schedule': _one_of(*optimizer.SCHEDULES),
    'optimizer.warmup_steps': _at_least(0),
    'optimizer.b1': _FRACTION,
    'optimizer.b2': _FRACTION,
    'optimizer.eps': _POSITIVE,
    'optimizer.weight_decay': _at_least(0),
    'optimizer.clip_norm': _at_least(0),
    'train.steps': _at_least(1),
    'train.batch_size': _at_least(1),
    'train.accumulate': _at_least(1),
    'train.max_skipped_in_row': _at_least(1),
    'train.stuck_after_seconds': _at_least(0),
    'mesh.data': (
        'at least 1, or -1 for all devices that fsdp leaves',
        lambda v: v >= 1 or v == -1,
    ),
    'mesh.fsdp': (
        'at least 1, or -1 for the devices that data leaves, up to '
        f'{sharding.MAX_GROUP} if that is -1 too',
        lambda v: v >= 1 or v == -1,
    ),
    'log.every': _at_least(1),
    'log.writer': (
        f"names of {', '.join(writers.KINDS)}, joined by commas, or ''",
        lambda v: set(writers.names_in(v)) <= writers.KINDS.keys(),
    ),
    'log.grid_every': _at_least(0),
    'log.grid_columns': _at_least(1),
    'checkpoint.every': _at_least(1),
    'checkpoint.keep_last': _at_least(1),
    'checkpoint.keep_best': _at_least(0),
    'sample.batch_size': _at_least(1),
    'scores.checkpoint_samples': _at_least(0),
}

# The same for the options of objectives; methods that share an option share its rule.
OPTION_RULES = {
    'label_dropout': _FRACTION,
    'base_steps': _POWER_OF_TWO,
    'guidance_interval': _FRACTION,
    'consistency': _one_of('bootstrap', 'derivative', 'difference'),
    'step_draw': _one_of('dyadic', 'ends', 'uniform'),
    'bootstrap_split': _one_of('half', 'random'),
    'consistency_huber': _at_least(0),
    'difference_distance': ('in (0, 0.5]; 0.005 is usual', lambda v: 0 < v <= 0.5),
    'interval': _one_of('fixed', 'input'),
    'guidance_target': _one_of('unguided', 'guided'),
    'guidance_draw': _one_of('grid', 'uniform', 'log_uniform'),
    'guidance_power': _at_least(0),
    'step_power': _at_least(0),
    'null_share': _FRACTION,
    'time_draw': _one_of('uniform', 'logit_normal'),
    'midpoint': _one_of('target', 'online'),
    'bootstrap_every': (
        'at least 2, so that a share of the batch is left for flow matching; 8 is '
        'usual',
        lambda v: v >= 2,
    ),
    'bootstrap_weight': _POSITIVE,
    'guidance': (
        'at least 0 and finite: it is the classifier-free-guidance scale - 1',
        lambda v: 0 <= v < math.inf,
    ),
    'cfg_levels': _one_of('finest', 'all'),
    'target_clip': ("above 0; 4 is usual, float('inf') clips nothing", lambda v: v > 0),
    'group_size': ('at least 1; 4 is usual, 1 and 2 collapse', lambda v: v >= 1),
    'data_std': (
        "a positive number, the standard deviation of the data's values",
        lambda v: 0 < v < math.inf,
    ),
    'sampler': _one_of('pushforward', 'restart'),
    'guidance_mix': _FRACTION,
    'time_std': _POSITIVE,
    'tangent': _one_of('boundary', 'head'),
    'guidance_beta': _at_least(0),
    'guidance_max': _POSITIVE,
    'norm_eps': _POSITIVE,
    'anneal_rate': ('above 0 and finite; 25 is usual', lambda v: 0 < v < math.inf),
    'alpha_margin': ('in [0, 0.5)', lambda v: 0 <= v < 0.5),
    'alpha': ('in [0, 1], or -1 to anneal it', lambda v: v == -1 or 0 <= v <= 1),
    'direction': _one_of('data', 'network'),
    'log_std': _POSITIVE,
}


def validate(config) -> None:
    """Raises for the first invalid field of a config.

    Raises:
      ValueError: naming the field, the value, what is allowed and what to do.
    """
    _refuse(_problems(config))


def _refuse(problems: Iterator[str]) -> None:
    problem = next(problems, None)
    if problem:
        raise ValueError(problem)


def _problems(c) -> Iterator[str]:
    """Yields problems in words; each check assumes that the previous ones passed."""
    flat = config_lib.flatten(c)
    for name, value in flat.items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int) and abs(part) >= 2**31:
                yield f'{name} = {value} must be less than 2**31'
            if isinstance(part, float) and math.isnan(part):
                yield f'{name} = {value} must be a number'
    yield from _rule_problems(flat, RULES)
    yield from _option_problems(c.objective)
    yield from _model_problems(c)
    yield from _data_problems(c)
    objective = objectives.create(num_classes=1, **c.objective)
    yield from _objective_problems(c, objective)
    if c.wavelet.enabled:
        yield from _wavelet_problems(c)
    transport = c.transport
    if transport.method == 'semidiscrete' and not transport.per_class:
        yield (
            "transport.method = 'semidiscrete' draws the label before the noise, which "
            'couples each class separately; set transport.per_class = True'
        )
    if c.optimizer.warmup_steps >= c.train.steps:
        yield (
            f'optimizer.warmup_steps = {c.optimizer.warmup_steps} must be less than '
            f'train.steps = {c.train.steps}'
        )
    for name in ('sample.steps', 'log.grid_steps'):
        for number in flat[name]:
            if not 1 <= number <= objective.base_steps:
                yield (
                    f'{name} = {flat[name]}: each must lie in 1 .. '
                    f'{objective.base_steps}, the steps that the method is trained for'
                )
    if c.model.attention == 'cudnn' and objective.has_forward_derivative:
        yield (
            "model.attention = 'cudnn' has no forward-mode derivative, which this "
            "objective takes; use 'auto' or 'xla'"
        )
    if c.objective.name == 'alpha_flow' and c.model.dtype == 'bfloat16':
        field = 'alpha_margin' if c.objective.alpha == -1 else 'alpha'
        value, smallest = c.objective[field], alpha_flow.MIN_BFLOAT16_ALPHA
        if value < smallest and (field == 'alpha_margin' or value > 0):
            yield (
                f'objective.{field} = {value} lets the target divide the rounding '
                f"errors of model.dtype = 'bfloat16' by less than {smallest}, which "
                f"makes it mostly noise; use {smallest} or more, or 'float32'"
            )
    for name in ('sample.guidance', 'log.grid_guidance'):
        values = flat[name] if isinstance(flat[name], tuple) else (flat[name],)
        yield from _guidance_problems(name, values, objective.guidance_range)
    for name in writers.names_in(c.log.writer):
        if package := writers.missing_distribution(name):
            yield (
                f'log.writer = {c.log.writer!r} needs the package {package}: run `pip '
                f'install {package}`, or leave {name!r} out'
            )
    if c.scores.enabled and c.scores.samples < 100:
        yield (
            f'scores.samples = {c.scores.samples} must be at least 100 for a Frechet '
            'distance; or set scores.enabled = False'
        )


def _rule_problems(flat, rules, prefix: str = '') -> Iterator[str]:
    for name, value in flat.items():
        if name in rules and not rules[name][1](value):
            yield f'{prefix}{name} = {value!r} must be {rules[name][0]}'


def _option_problems(options) -> Iterator[str]:
    if options.name not in objectives.names():
        names = ', '.join(objectives.names())
        yield f'objective.name = {options.name!r} must be one of {names}'
    allowed = {'name', *objectives.options(options.name)}
    if set(options) != allowed:
        yield (
            f'objective.name = {options.name!r} has the options '
            f'{sorted(allowed - {"name"})}, but config.objective has '
            f'{sorted(set(options) - {"name"})}; start from config.objective = '
            f'objective_defaults({options.name!r})'
        )
    yield from _rule_problems(options, OPTION_RULES, 'objective.')
    if options.name == 'ism':
        yield from _ism_problems(options)
    elif options.name in ('meanflow', 'alpha_flow', 'imf'):
        split = options.batch_split
        if len(split) != 2 or any(s != int(s) or s < 0 for s in split) or not split[1]:
            usual = objectives.options(options.name)['batch_split']
            yield (
                f'objective.batch_split = {split} must be two integers: the shares of '
                f'samples with d = 0 and, at least 1, with d > 0; {usual} is usual'
            )
    if options.name in ('meanflow', 'alpha_flow'):
        if not 0 <= options.guidance_start <= options.guidance_end <= 1:
            yield (
                f'objective.guidance_start = {options.guidance_start} and guidance_end '
                f'= {options.guidance_end} must be 0 <= start <= end <= 1'
            )
    elif options.name == 'consistency':
        low, high = options.sigma_min, options.sigma_max
        if not 0 < low < high < math.inf:
            yield (
                f'objective.sigma_min = {low} and sigma_max = {high} must be 0 < '
                'sigma_min < sigma_max; 0.002 and 80 are usual'
            )
        if not 1 <= options.first_intervals <= options.last_intervals:
            yield (
                f'objective.first_intervals = {options.first_intervals} must lie in 1 '
                f'.. last_intervals = {options.last_intervals}'
            )
    if options.name == 'alpha_flow':
        start, end = options.anneal_start, options.anneal_end
        if not 0 <= start < end <= 1:
            yield (
                f'objective.anneal_start = {start} and anneal_end = {end} must be 0 <= '
                'start < end <= 1, shares of the training'
            )


def _ism_problems(options) -> Iterator[str]:
    for name in ('batch_split', 'loss_weights'):
        values = options[name]
        if len(values) != 3 or min(values) < 0 or not 0 < sum(values) < math.inf:
            yield (
                f'objective.{name} = {values} must be three numbers of at least 0, not '
                'all 0: velocity, guidance, consistency'
            )
    if any(share != int(share) for share in options.batch_split):
        yield (
            f'objective.batch_split = {options.batch_split} must be integers, '
            'such as (2, 1, 1) for a half and two quarters'
        )
    if options.step_draw == 'dyadic':
        for name, usual in (('consistency', 'bootstrap'), ('bootstrap_split', 'half')):
            if options[name] != usual:
                yield (
                    f'objective.{name} = {options[name]!r} needs steps of any size; '
                    "set objective.step_draw = 'ends'"
                )
    if options.guidance_draw != 'grid':
        return
    step = options.guidance_step
    count = options.guidance_max / step if step > 0 else 0
    if count < 1 or abs(count - round(count)) > 1e-6:
        yield (
            f'objective.guidance_max = {options.guidance_max} must be a positive '
            f'multiple of objective.guidance_step = {step}'
        )


def _model_problems(c) -> Iterator[str]:
    side, patch = c.data.image_size, c.model.patch_size
    if side % patch:
        yield (
            f'model.patch_size = {patch} does not divide data.image_size = {side}; '
            f'choose a divisor of {side}'
        )
    if c.model.backbone == 'unet':
        yield from _unet_problems(c)
    else:
        yield from _transformer_problems(c)


def _attention_problems(c, side, patch, width, field) -> Iterator[str]:
    """Problems of self-attention over the patches of an image with this side.

    `width` is that of the tokens, `field` its name for the message.
    """
    if (tokens := (side // patch) ** 2) > sit.MAX_TOKENS:
        yield (
            f'data.image_size = {c.data.image_size} in patches of model.patch_size = '
            f'{c.model.patch_size} makes {tokens} tokens, more than {sit.MAX_TOKENS}; '
            'use larger patches, or latents'
        )
    if width % c.model.num_heads:
        yield (
            f'model.num_heads = {c.model.num_heads} does not divide {field} = {width}; '
            f'choose a divisor of {width}'
        )


def _unet_problems(c) -> Iterator[str]:
    side, model = c.data.image_size, c.model
    levels = len(model.channel_multipliers)
    coarsest = model.patch_size * 2 ** (levels - 1)
    if side % coarsest:
        yield (
            f'model.channel_multipliers = {model.channel_multipliers} halves the '
            f'resolution {levels - 1} times, but data.image_size = {side} is no '
            f'multiple of model.patch_size times {2 ** (levels - 1)} = {coarsest}; use '
            'fewer levels or smaller patches'
        )
    if model.attention_levels > levels:
        yield (
            f'model.attention_levels = {model.attention_levels} must be at most '
            f'{levels}, the number of levels in model.channel_multipliers'
        )
    for level in range(levels - model.attention_levels, levels):
        width = model.hidden_size * model.channel_multipliers[level]
        patch, field = model.patch_size * 2**level, f'the width of level {level}'
        yield from _attention_problems(c, side, patch, width, field)
    if model.velocity_head:
        yield (
            f'model.velocity_head = {model.velocity_head}: the U-Net has no second '
            "output; set it to 0, or model.backbone to 'sit'"
        )


def _transformer_problems(c) -> Iterator[str]:
    side, patch, width = c.data.image_size, c.model.patch_size, c.model.hidden_size
    yield from _attention_problems(c, side, patch, width, 'model.hidden_size')
    if c.model.velocity_head >= c.model.depth:
        yield (
            f'model.velocity_head = {c.model.velocity_head} must be less than '
            f'model.depth = {c.model.depth}, so that the outputs share a block'
        )
    odd = width // c.model.num_heads % 2
    if c.model.backbone == 'in_context' and odd:
        yield (
            f'model.num_heads = {c.model.num_heads} divides model.hidden_size = '
            f'{width} into heads of odd width, but rotary positions rotate pairs of '
            'channels; choose an even width'
        )
    if c.model.mlp_ratio * width < 1:
        yield (
            f'model.mlp_ratio = {c.model.mlp_ratio} of model.hidden_size = '
            f'{width} gives MLPs of width 0; 4.0 is usual'
        )


def _data_problems(c) -> Iterator[str]:
    latents = c.data.source.startswith('latents:')
    if c.data.autoencoder and not latents and c.data.source:
        yield (
            f'data.autoencoder = {c.data.autoencoder!r} decodes latents, but '
            f'data.source = {c.data.source!r} gives images; set it to '
            "'latents:PATH' (see ism_jax.prepare_data) or data.autoencoder to ''"
        )
    if latents and paths.is_bucket(c.data.source) and not c.data.cache_dir:
        yield (
            f'data.source = {c.data.source!r} is in a bucket, which is slow to read '
            'record by record; set data.cache_dir to a folder on a local disk, to '
            'which the latents are copied once'
        )
    if latents and c.scores.enabled:
        yield (
            f'scores.enabled = True, but data.source = {c.data.source!r} has no images '
            'for the small classifier to learn from; set scores.enabled = False'
        )
    if c.data.source and not latents and c.data.channels not in (1, 3):
        yield (
            f'data.channels = {c.data.channels}: images have 1 (grey) or 3 (RGB) '
            'channels'
        )
    if c.data.source in ('mnist', 'fashion_mnist') and c.data.channels != 1:
        yield (
            f'data.channels = {c.data.channels}, but data.source = {c.data.source!r} '
            'is grey; set data.channels = 1'
        )
    mean, std = c.data.latent_mean, c.data.latent_std
    if not mean and not std:
        return
    given = f'data.latent_mean = {mean} and data.latent_std = {std}'
    if not latents:
        yield (
            f'{given} are of latents, but data.source = {c.data.source!r}; set both '
            'to ()'
        )
    if not len(mean) == len(std) == c.data.channels or not min(std) > 0:
        yield (
            f'{given} must have a number for each of the data.channels = '
            f'{c.data.channels}, std above 0; the manifest of the latents has '
            'them as channel_mean and channel_std'
        )


def _objective_problems(c, objective) -> Iterator[str]:
    needed = {'interval_input': False, 'velocity_head': 0} | objective.model_options
    # Each with the option of the method that may decide it.
    decided_by = {
        'step_embedding': 'step_draw',
        'interval_input': 'interval',
        'velocity_head': 'tangent',
    }
    for name, option in decided_by.items():
        given = c.model[name]
        fitting = needed.get(name, given)
        # A velocity head may have any number of blocks.
        if given != fitting and not (name == 'velocity_head' and given and fitting):
            chosen = f'objective.name = {c.objective.name!r}'
            if option in c.objective:
                chosen += f' with objective.{option} = {c.objective[option]!r}'
            yield (
                f'model.{name} = {given!r} does not fit {chosen}; set it to {fitting!r}'
            )
    # The official shortcut-models code accepts these silently.
    size, parts = c.train.batch_size, c.train.accumulate
    multiple = objective.batch_multiple * parts
    smallest = objective.min_batch * parts
    given = f'train.batch_size = {size} (in train.accumulate = {parts} part(s))'
    if size < smallest:
        yield (
            f'{given} is too small: with fewer than {smallest} samples some step sizes '
            f'would never be trained; choose at least {smallest}, or give '
            'self-consistency a larger share in objective.batch_split'
        )
    if size % multiple:
        yield (
            f'{given} must be a multiple of {multiple}, so that it splits into exact '
            f'shares; choose {max(smallest, size // multiple * multiple)} '
            f'or {(size // multiple + 1) * multiple}'
        )


def _wavelet_problems(c) -> Iterator[str]:
    name, levels = c.wavelet.name, c.wavelet.levels
    known = wavelet.wavelet_names()
    if name not in known:
        yield (
            f'wavelet.name = {name!r} is not a discrete wavelet of PyWavelets'
            + config_lib.suggestion(name, known)
        )
    most = wavelet.max_levels(c.data.image_size, c.data.image_size)
    if levels > most:
        yield (
            f'wavelet.levels = {levels} must lie in 1 .. {most} for images of '
            f'data.image_size = {c.data.image_size}: each level halves the side '
            'exactly' + ('' if most else '; or set wavelet.enabled = False')
        )
    weighting = c.wavelet.weighting
    weights = wavelet.parse_weighting(weighting)
    if weights == weighting:  # A name.
        if weighting not in wavelet.WEIGHTINGS:
            yield (
                f'wavelet.weighting = {weighting!r} is unknown; choose one of '
                f"{', '.join(wavelet.WEIGHTINGS)}, or weights 'a,b,...'"
            )
        return
    if len(weights) not in (1 + levels, 1 + 3 * levels):
        yield (
            f'wavelet.weighting = {weighting!r} has {len(weights)} weights; for '
            f'wavelet.levels = {levels} give {1 + levels} (approximation, then levels '
            f'{levels} .. 1) or {1 + 3 * levels} (in the order '
            f'{", ".join(wavelet.band_names(levels))})'
        )
    if not all(0 < w < math.inf for w in weights):
        yield (
            f'wavelet.weighting = {weighting!r} must be positive and finite: with a '
            'weight of 0 the minimiser would no longer be the conditional mean; give a '
            'small one, such as 0.01'
        )


def _guidance_problems(name: str, values, guidance_range) -> Iterator[str]:
    low, high = guidance_range
    for w in values:
        if not low <= w <= high:
            yield (
                f'{name} = {w} must lie in [{low:g}, {high:g}], the guidance scales w '
                'that the method offers when sampling'
            )


def check_guidance(objective, values) -> None:
    """Rejects guidance scales that the method does not offer, such as those of a flag.

    Raises:
      ValueError: naming the value and the range.
    """
    _refuse(_guidance_problems('guidance', values, objective.guidance_range))


def check_interval(objective, interval) -> None:
    """Rejects a guidance interval that the method does not offer.

    Args:
      objective: the method.
      interval: start and end time of guidance, or None for the method's default.

    Raises:
      ValueError: naming the values.
    """
    if interval is None:
        return
    if not objective.conditions_on_interval:
        raise ValueError(
            f'interval = {interval}: the network is not conditioned on the guidance '
            "interval; leave it out, or train with objective.interval = 'input'"
        )
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f'interval = {interval} must be a start and an end time with 0 <= start < '
            'end <= 1, such as 0.3,1'
        )


def mesh_shape(config, device_count: int) -> tuple[int, int]:
    """Sizes (data, fsdp) of the mesh of a config.

    Raises:
      ValueError: it does not fill the devices; names the fields and the numbers.
    """
    data, fsdp = config.mesh.data, config.mesh.fsdp
    shape = sharding.mesh_shape(data, fsdp, device_count)
    if fsdp != -1 and device_count % fsdp:
        raise ValueError(
            f'mesh.fsdp = {fsdp} does not divide the {device_count} devices; choose a '
            'divisor'
        )
    if math.prod(shape) != device_count:
        raise ValueError(
            f'mesh.data = {data} times mesh.fsdp = {fsdp} is not the number of devices '
            f'{device_count}; set mesh.data = -1 to use all that fsdp leaves'
        )
    return shape


def check_devices(config, device_count: int, process_count: int) -> None:
    """Rejects a mesh or a batch that does not divide evenly.

    Raises:
      ValueError: naming the field and the numbers.
    """
    _refuse(_device_problems(config, device_count, process_count))


def _device_problems(c, device_count, process_count) -> Iterator[str]:
    try:
        mesh_shape(c, device_count)
    except ValueError as error:
        yield str(error)
    size, parts = c.train.batch_size, c.train.accumulate
    if size // parts % device_count:
        yield (
            f'train.batch_size = {size} in train.accumulate = {parts} part(s) must '
            f'split evenly over the {device_count} devices; choose a multiple of '
            f'{device_count * parts}'
        )
    if size % process_count:
        yield (
            f'train.batch_size = {size} must be a multiple of the {process_count} '
            'processes'
        )


def check_source(config, source) -> None:
    """Rejects fields that the opened data source does not support.

    Raises:
      ValueError: naming the field.
    """
    fields = []
    if config.data.classes_per_pool:
        fields.append(f'data.classes_per_pool = {config.data.classes_per_pool}')
    if config.transport.enabled and config.transport.method == 'semidiscrete':
        fields.append("transport.method = 'semidiscrete'")
    if fields and not hasattr(source, 'labels'):
        raise ValueError(
            f'{" and ".join(fields)} needs the labels before the images are read, and '
            f'{source!r} has none; prepare latents, use a folder or keep the default'
        )
    if config.scores.enabled and len(source) < sample_scorer.MIN_REAL_IMAGES:
        raise ValueError(
            f'scores.enabled = True, but {source!r} has fewer than '
            f'{sample_scorer.MIN_REAL_IMAGES} images to score against; add images, or '
            'set scores.enabled = False'
        )


# Fields that may change when a run resumes: its length and what it reports.
RESUMABLE = (
    'train.steps',
    'train.max_skipped_in_row',
    'train.stuck_after_seconds',
    'data.num_threads',
    'data.prefetch',
    'data.dir',
    'data.cache_dir',
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


def check_resume(old, new, workdir) -> list[str]:
    """Lines 'field: old -> new' of what changed since the run was started.

    Args:
      old: the config that the run in `workdir` was started with.
      new: the config to resume it with.
      workdir: folder of the run, for the message.

    Raises:
      ValueError: a changed field that would make it another run. `train.steps` is one
        if a curriculum or a decaying learning rate depends on it: the finished steps
        would have had other values.
    """
    old_fields, new_fields = config_lib.flatten(old), config_lib.flatten(new)
    allowed, refused = [], []
    for name in sorted(old_fields.keys() | new_fields.keys()):
        before, after = old_fields.get(name), new_fields.get(name)
        if before == after:
            continue
        free = any(name == f or name.startswith(f'{f}.') for f in RESUMABLE)
        line = f'{name}: {before!r} -> {after!r}'
        if name == 'train.steps':
            follows = _what_follows_the_length(old)
            free = not follows
            line += f' (its {follows} depends on the length)' if follows else ''
        (allowed if free else refused).append(line)
    if refused:
        raise ValueError(
            f'{workdir} holds a run with another config; these fields cannot change: '
            + '; '.join(refused)
            + (f'. These may change: {"; ".join(allowed)}' if allowed else '')
            + '. Set them back or give a new --workdir'
        )
    return allowed


def _what_follows_the_length(config) -> str:
    if objectives.create(num_classes=1, **config.objective).has_curriculum:
        return f'curriculum ({config.objective.name})'
    if config.optimizer.schedule != 'constant':
        return f'learning rate (optimizer.schedule = {config.optimizer.schedule!r})'
    return ''
