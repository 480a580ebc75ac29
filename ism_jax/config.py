"""The configuration: every field with its default and meaning, and presets.

A config file (`configs/*.py`) starts from `default()`, changes some fields and states
the expected result in its docstring. `python -m ism_jax.train
--help=config` prints the fields; `ism_jax.config_check` has the allowed values.
"""

import ast
import difflib
import json
from typing import Any

import ml_collections

from ism_jax import objectives
from ism_jax.method import wavelet
from ism_jax.models import sit
from ism_jax.objectives import alpha_flow

_XL2 = sit.preset('XL/2')
# Fields of the model that a method may decide.
CONDITIONS = ('step_embedding', 'time_scale', 'guidance_embedding', 'interval_input')

# Field -> (default, meaning). Defaults are the paper's; where the paper leaves a choice
# open, the meaning says "open". A comment then has the Frechet distances in 1 / 4 steps
# of `configs/ablation.py:ism` with other values; the defaults have 20.6 / 9.6
# (`results/choices.json`, `results/ladder_1000_samples.json`; standard errors are about
# 1.5 / 0.8, so most choices do not matter there). The options of `objective` are in
# `ism_jax/objectives/`.
# fmt: off
FIELDS: dict[str, tuple[Any, str]] = {
    'seed': (0, 'random seed of the run'),

    'data.source': ('mnist', "'mnist', 'fashion_mnist', 'tfds:NAME', 'folder:PATH', 'parquet:PATTERN', 'hf:NAME', 'tar:PATTERN' or 'latents:PATH'; a PATH may be in a bucket"),
    'data.dir': ('', "folder of the source's files; '' for the source's default"),
    'data.cache_dir': ('', "local folder for a copy of 'latents:' in a bucket"),
    'data.image_size': (32, 'side of the images or latents, in pixels'),
    'data.channels': (1, '1 (grey), 3 (RGB), or the channels of the latents'),
    'data.flip': (False, 'random horizontal flips'),
    'data.on_corrupt': ('error', "'error' stops at an unreadable image, 'skip' replaces it with the next"),
    'data.classes_per_pool': (0, 'approximate number of classes per transport pool; 0 mixes all classes'),
    'data.autoencoder': ('', "decodes latents: folder, safetensors file or hub id; '' for none"),
    'data.latent_mean': ((), "mean per channel, for (latent - mean) / std; () for the autoencoder's scale"),
    'data.latent_std': ((), 'standard deviation per channel; see latent_mean'),
    'data.num_threads': (2, 'number of threads that read images'),
    'data.prefetch': (2, 'number of pools read ahead'),
    'data.retry_seconds': (60.0, 'how long to retry an image that the file system cannot read'),

    'model.backbone': ('sit', "'sit', 'in_context' (conditions as tokens, RMS norm, SwiGLU, rotary positions) or 'unet'"),
    'model.hidden_size': (_XL2['hidden_size'], 'width of the transformer, or of the finest level of the U-Net; the sizes are those of SiT-XL/2'),
    'model.depth': (_XL2['depth'], 'number of transformer blocks; not for the U-Net, like mlp_ratio, unroll and velocity_head'),
    'model.num_heads': (_XL2['num_heads'], 'heads of each self-attention'),
    'model.patch_size': (_XL2['patch_size'], 'side of a patch, in pixels of the image or latent'),
    'model.mlp_ratio': (4.0, 'hidden width of the MLPs divided by hidden_size'),
    'model.channel_multipliers': ((1, 2, 2), "width of each level of the U-Net divided by hidden_size, finest first"),
    'model.blocks_per_level': (1, 'residual blocks per level of the U-Net, down and up'),
    'model.attention_levels': (1, 'number of coarsest levels of the U-Net with self-attention'),
    'model.dtype': ('float32', "dtype of the computation, 'float32' or 'bfloat16'; parameters are float32"),
    'model.remat': ('none', "rematerialisation: 'none', 'dots' keeps matrix products, 'full' recomputes all"),
    'model.attention': ('auto', "attention kernel: 'xla', 'cudnn', or 'auto', which is cuDNN's on a GPU where it works"),
    'model.unroll': (1, 'layers per iteration of the scan over layers'),
    'model.step_embedding': ('level', "embedding of the step size: 'level' for powers of two, 'size' for any"),
    'model.time_scale': (1000.0, 'factor on t and d before their sinusoids'),
    'model.guidance_embedding': ('scale', "embedding of the guidance scale: 'scale' of w, 'ratio' of w / (1 + w)"),
    'model.interval_input': (False, 'whether the guidance interval is an input'),
    'model.velocity_head': (0, 'blocks of an auxiliary velocity head, for objective.tangent = head of imf; 0 for none'),

    'wavelet.enabled': (True, 'wavelet distance in the loss; False for squared error'),
    'wavelet.name': ('haar', 'open: a discrete wavelet of PyWavelets'),
    'wavelet.levels': (5, 'number of levels of the wavelet transform'),
    # equal_variance 21.7 / 9.8, nested 22.5 / 11.9, orthonormal_mean 59 / 33; squared
    # error 19.1 / 9.2.
    'wavelet.weighting': (wavelet.DEFAULT_WEIGHTING, "open: name of a weighting of the bands, or weights 'a,b,...'"),

    'transport.enabled': (True, 'pair noise and data by scaling optimal transport'),
    'transport.batches': (32, 'K, number of batches per pool'),
    'transport.method': ('permutation', "'permutation' or 'row_sampling' of a pool's transport plan, or 'semidiscrete' (docs/method.md)"),
    # False 39.4 / 20.4 (docs/results.md on its skew); no transport 25.2 / 11.4.
    'transport.per_class': (True, 'open: couple each class separately'),
    # 0.02: 21.1 / 9.9, 0.5: 22.9 / 10.6.
    'transport.epsilon': (0.1, 'open: entropic regularisation, in standard deviations of the cost'),
    'transport.max_iterations': (200, 'largest number of Sinkhorn iterations'),
    'transport.tolerance': (0.05, 'L1 error of the marginals at which Sinkhorn stops; they sum to 1'),
    'transport.samples_per_point': (128, "'semidiscrete': noise samples per data point to learn its potential from"),

    'ema.twin': (True, 'separate target EMA; False uses the inference EMA for targets'),
    # 0.99: 22.8 / 12.0, 0.999: 437 / 431 (self-consistency is not learned).
    'ema.target_decay': (0.95, 'decay of the target EMA'),
    'ema.infer_decay': (0.9999, 'decay of the inference EMA'),
    'ema.warmup': (True, 'start the inference EMA with smaller decays'),

    # Open in the paper; as in SiT and SM.
    'optimizer.learning_rate': (1e-4, 'peak learning rate'),
    'optimizer.schedule': ('constant', "learning rate after the warm-up: 'constant', 'cosine' or 'linear'"),
    'optimizer.warmup_steps': (0, 'steps of linear learning-rate warm-up'),
    'optimizer.b1': (0.9, 'beta_1 of AdamW'),
    'optimizer.b2': (0.999, 'beta_2 of AdamW'),
    'optimizer.eps': (1e-8, 'epsilon of AdamW'),
    'optimizer.weight_decay': (0.0, 'weight decay of AdamW, on matrices only'),
    'optimizer.clip_norm': (0.0, 'global norm at which gradients are clipped; 0 for no clipping'),

    'train.steps': (800_000, 'number of training steps'),
    'train.init_from': ('', "start from this folder, written by ism_jax.convert; '' for none"),
    'train.batch_size': (256, 'global batch size, over all devices and processes'),
    'train.accumulate': (1, 'gradient accumulation: number of equal parts of a batch'),
    'train.max_skipped_in_row': (10, 'non-finite steps in a row before the run stops'),
    'train.stuck_after_seconds': (1200.0, 'print all stacks if a step takes longer; 0 for never'),

    'mesh.data': (-1, 'number of devices that split the batch; -1 for all that fsdp leaves'),
    'mesh.fsdp': (1, 'number of devices that also split parameters, optimizer state and EMAs; -1 for up to 8'),

    'log.every': (100, 'steps between logs of scalars'),
    'log.parameters': (True, 'print a table of all parameters at the start'),
    'log.writer': ('tensorboard', "where records go, joined by commas: 'tensorboard', 'jsonl', 'wandb', 'mlflow'; '' for nowhere"),
    'log.grid_every': (10_000, 'steps between grids of samples; 0 for none, and no samples.png at the end'),
    'log.grid_columns': (10, 'columns of a grid'),
    'log.grid_steps': ((1, 4), 'numbers of sampling steps, one grid for each'),
    'log.grid_guidance': (1.0, 'guidance scale w of the grids'),

    'checkpoint.every': (10_000, 'steps between checkpoints'),
    'checkpoint.keep_last': (2, 'number of latest checkpoints to keep'),
    'checkpoint.keep_best': (1, 'number of checkpoints with the lowest score to keep as well'),

    'sample.steps': ((1, 2, 4, 8, 128), 'numbers of sampling steps to sample and score'),
    'sample.guidance': ((0.0, 1.0, 2.5), 'guidance scales w to sample and score'),
    'sample.batch_size': (100, 'samples per batch in grids and scores'),

    'scores.enabled': (True, "score samples by a small classifier after training"),
    'scores.samples': (1000, 'number of samples per pair of steps and w'),
    'scores.checkpoint_samples': (0, 'samples (in 4 steps) whose score ranks a checkpoint; 0 ranks by loss'),
}
# fmt: on


def default() -> ml_collections.ConfigDict:
    """The config of the paper's method: `FIELDS`, with iSM as the objective."""
    config = ml_collections.ConfigDict()
    for name, (value, _) in FIELDS.items():
        section, _, field = name.rpartition('.')
        if section and section not in config:
            config[section] = ml_collections.ConfigDict()
        (config[section] if section else config)[field] = value
    config.objective = objective_defaults('ism')
    return config


def objective_defaults(name: str) -> ml_collections.ConfigDict:
    """`config.objective` of a method: its name and its options with their defaults."""
    return ml_collections.ConfigDict({'name': name, **objectives.options(name)})


def use_objective(config, name: str, **options) -> None:
    """Makes `config` train another method; options not given have their defaults.

    The parts that belong to iSM (wavelet distance, transport, twin EMA) are switched
    off, the network is conditioned on the step size as the method needs, and the
    guidance scales for sampling are clipped to the method's range.
    """
    config.objective = objective_defaults(name)
    if name == 'alpha_flow' and config.model.dtype == 'bfloat16':
        config.objective.alpha_margin = alpha_flow.MIN_BFLOAT16_ALPHA
    config.objective.update(options)
    for part in (config.wavelet, config.transport):
        part.enabled = name == 'ism'
    config.ema.twin = name == 'ism'
    objective = objectives.create(num_classes=1, **config.objective)
    config.model.update(objective.model_options)
    low, high = objective.guidance_range
    clip = lambda w: min(max(w, low), high)
    config.sample.guidance = tuple(sorted({clip(w) for w in config.sample.guidance}))
    config.log.grid_guidance = clip(config.log.grid_guidance)


# The rows of the paper's ablation after `sm`, each with one more part. `+balance` comes
# first, and is not in the paper: SM with iSM's shares and weights of the terms. Otherwise
# `+intrinsic_guidance` would change both.
PARTS = {
    '+balance': 'balance',
    '+intrinsic_guidance': 'intrinsic_guidance',
    '+interval': 'interval',
    '+wavelet': 'wavelet',
    '+sot': 'sot',
    'ism': 'twin_ema',
}
RUNGS = ('sm', *PARTS)
# Full iSM without one part. Without intrinsic guidance, the loss is that of `+balance`.
REMOVALS = tuple(f'ism-{part}' for part in PARTS.values() if part != 'balance')


def _use_rung(config, rung: str) -> None:
    """Makes an iSM config train one of `RUNGS` or `REMOVALS`."""
    if rung == 'sm':
        use_objective(config, 'shortcut')
        return
    parts = list(PARTS.values())
    if rung in PARTS:
        active = parts[: list(PARTS).index(rung) + 1]
    else:
        active = [part for part in parts if rung != f'ism-{part}']
    if 'intrinsic_guidance' in active:
        config.objective.guidance_interval = 0.3 if 'interval' in active else 0.0
    else:
        # Three samples of velocity to one of consistency, each term with weight 1.
        use_objective(config, 'shortcut', bootstrap_every=4, bootstrap_weight=3.0)
    config.wavelet.enabled = 'wavelet' in active
    config.transport.enabled = 'sot' in active
    config.ema.twin = 'twin_ema' in active


def use_best(config, *, guidance_max: float) -> None:
    """Makes an iSM config train the best recipe that we have measured.

    The finite difference over steps of any size, with a pseudo-Huber loss; the guidance
    interval as an input; the null label at every d and w; no wavelet distance.
    `docs/results.md` has the figure that chose each field.

    Args:
      config: changed in place.
      guidance_max: largest guidance scale w; no larger than samples will use.
    """
    config.objective.update(
        consistency='difference',
        difference_distance=0.05,
        step_draw='ends',
        consistency_huber=0.3,
        interval='input',
        null_share=0.1,
        guidance_max=guidance_max,
    )
    config.model.update(step_embedding='size', time_scale=1.0, interval_input=True)
    config.wavelet.enabled = False


def recipes(systems) -> tuple[str, ...]:
    """Names of the recipes that `use_recipe` knows, in the order of a table's rows."""
    return (*RUNGS, *REMOVALS, 'best', *systems)


def use_recipe(config, argument: str, systems, *, guidance_max: float):
    """Makes an iSM config train a row of a table of methods.

    Args:
      config: changed in place.
      argument: a rung or removal, 'best', or one of `systems`; 'ism' if it is empty.
        Arguments of `with_argument` may follow after a comma.
      systems: options of the objective of other methods, {method: {option: value}}.
      guidance_max: largest guidance scale w of 'best'.

    Raises:
      ValueError: an unknown name.
    """
    recipe, _, rest = argument.partition(',')
    if recipe == 'runlocal':
        recipe, rest = '', recipe
    recipe = recipe or 'ism'
    if recipe not in recipes(systems):
        names = ', '.join(recipes(systems))
        raise ValueError(f'recipe {recipe!r} is not one of {names}')
    if recipe in systems:
        use_objective(config, recipe, **systems[recipe])
        if recipe == 'imm':
            # The paper has 1000. On Fashion-MNIST at 16x16, one seed, the FD in one step
            # is 7.3 with 1 and 152 with 1000.
            config.model.time_scale = 1.0
    elif recipe == 'best':
        use_best(config, guidance_max=guidance_max)
    else:
        _use_rung(config, recipe)
    return with_argument(config, rest)


def small_systems(data_std: float) -> dict[str, dict[str, float]]:
    """The other methods of a ladder on small images, for `use_recipe`.

    Their options are SM's guidance scale where guidance is part of training, the largest
    scale that is scored, and `data_std`, the standard deviation of the images.
    """
    return {
        'flow_matching': {},
        'consistency': {},
        'imm': {'data_std': data_std},
        'meanflow': {'guidance': 0.5},
        'imf': {'guidance_max': 1.5},
        'alpha_flow': {'guidance': 0.5},
    }


def use_small_ladder(config, *, learning_rate: float) -> None:
    """Sets the training and the scores that all recipes of a small ladder share."""
    config.train.update(batch_size=64, steps=3000)
    config.optimizer.update(
        learning_rate=learning_rate, schedule='cosine', warmup_steps=100, clip_norm=1.0
    )
    config.log.update(every=500, grid_every=0)
    config.checkpoint.every = 1000
    config.sample.update(
        steps=(1, 2, 4, 8, 128),
        guidance=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5),
        batch_size=250,
    )
    # ism_jax.ablation scores the runs.
    config.scores.update(enabled=False, samples=5000)


def use_small_unet(config, *, steps: int) -> None:
    """Trains the best recipe with a U-Net that is small enough for two CPU cores."""
    use_best(config, guidance_max=1.5)
    config.objective.guidance_interval = 0.0  # The default of samples.
    config.model.update(
        backbone='unet',
        hidden_size=32,
        patch_size=2,
        channel_multipliers=(1, 2),
        num_heads=2,
    )
    config.train.update(batch_size=32, steps=steps)
    config.optimizer.update(
        learning_rate=3e-3, schedule='cosine', warmup_steps=100, clip_norm=1.0
    )
    config.log.update(every=100, grid_every=1000)
    config.checkpoint.every = 1000
    config.sample.update(steps=(1, 2, 4, 8), guidance=(0.0, 1.0, 1.5), batch_size=250)
    config.scores.samples = 1000


def use_imagenet_latents(config, image_size: int) -> None:
    """Sets `config` to ImageNet latents of sd-vae-ft-mse, on an accelerator."""
    config.data.update(
        source=f'latents:/data/imagenet{image_size}',
        image_size=image_size // 8,
        channels=4,
        flip=True,
        autoencoder='stabilityai/sd-vae-ft-mse',
        num_threads=8,
        # classes_per_pool stays 0, although a pool of 8,192 holds only eight images per
        # class. Fewer classes would make the target EMA follow them: with 5, 2 and 1 of
        # 10 classes per pool, configs/ablation.py:ism has an FD of 24, 55 and 108 in
        # one step (one seed), and 23 with 0. Eight images keep half of the gain in
        # transport cost of 128.
    )
    config.model.update(dtype='bfloat16', remat='dots')
    # Each device then updates an eighth of the state. With 1, the optimizer and the EMAs
    # move a quarter of all bytes of a step on 16 chips (docs/performance.md).
    config.mesh.fsdp = -1
    config.scores.enabled = False


def with_argument(config, argument: str) -> ml_collections.ConfigDict:
    """Applies the argument of `configs/x.py:argument`, several joined by commas.

    The name of a method selects the method (`use_objective`), that of a size, such as
    'B/2', the size of the network. 'runlocal' keeps the method and shrinks the rest to a minute
    on one CPU, with the digits that come with the installation.

    Raises:
      ValueError: an unknown argument.
    """
    for part in filter(None, argument.split(',')):
        if part == 'runlocal':
            _shrink(config)
        elif part in objectives.names():
            # The config's own method may need other conditions.
            for name in CONDITIONS:
                config.model[name] = FIELDS[f'model.{name}'][0]
            use_objective(config, part)
        elif part in sit.PRESETS:
            config.model.update(sit.preset(part))
        else:
            raise ValueError(
                f"config argument {part!r} is unknown; use 'runlocal', a method "
                f'({", ".join(objectives.names())}) or a network size '
                f'({", ".join(sit.PRESETS)})'
            )
    return config


def _shrink(config) -> None:
    """Keeps the method and shrinks the rest to a minute on one CPU."""
    config.data.update(
        source='mnist',
        channels=1,
        image_size=32,
        autoencoder='',
        classes_per_pool=0,
        latent_mean=(),
        latent_std=(),
    )
    config.model.update(
        hidden_size=32,
        depth=2,
        num_heads=2,
        patch_size=8,
        channel_multipliers=(1, 2),
        attention_levels=1,
        dtype='float32',
        remat='none',
    )
    objective = objectives.create(num_classes=1, **config.objective)
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


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Every field as dotted name -> value."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f'{name}.{rest}': v for rest, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def to_json(config: ml_collections.ConfigDict) -> str:
    """The resolved config as JSON text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The resolved config as JSON has it: tuples are lists."""
    return json.loads(to_json(config))


def from_dict(content: dict[str, Any]) -> ml_collections.ConfigDict:
    """Inverse of `to_dict`; lists become tuples, as configs are written.

    Fields missing in an older config get their defaults, which reproduce its behaviour.
    """

    def restore(value):
        if isinstance(value, dict):
            return ml_collections.ConfigDict({k: restore(v) for k, v in value.items()})
        return tuple(value) if isinstance(value, list) else value

    given = restore(content)
    config = default()
    config.objective = objective_defaults(given.objective.name)
    config.update(given)
    config.lock()
    return config


def from_json(text: str) -> ml_collections.ConfigDict:
    """Inverse of `to_json`."""
    return from_dict(json.loads(text))


def set_field(config, change: str) -> None:
    """Sets a field, given as 'train.steps=100'.

    Raises:
      ValueError: no such field, or a value of another type than the field has.
    """
    name, equals, text = change.partition('=')
    flat = flatten(config)
    if not equals or name not in flat:
        raise ValueError(
            f'{change!r} sets no field of the config; write field=value'
            + suggestion(name, flat)
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


def suggestion(name: str, known) -> str:
    """'; did you mean ...?' with the closest of the known names, or ''."""
    close = difflib.get_close_matches(name, known, 3)
    return f'; did you mean {" or ".join(close)}?' if close else ''


def describe(config: ml_collections.ConfigDict) -> str:
    """Every field with its value and one line of meaning, section by section."""
    helps = {name: text for name, (_, text) in FIELDS.items()}
    options = {'name': f'the method: {", ".join(objectives.names())}'}
    options |= objectives.option_help(config.objective.name)
    helps |= {f'objective.{name}': text for name, text in options.items()}
    lines, last = [], ''
    for name, value in flatten(config).items():
        section = name.rpartition('.')[0]
        if section != last:
            lines += ['', f'{section}:']
            last = section
        lines.append(f'  --config.{name}={value!r}'.ljust(44) + f'  {helps[name]}')
    return '\n'.join(lines)
