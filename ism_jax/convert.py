r"""Converts checkpoints of other projects, and our runs for others.

    python -m ism_jax.convert sit --checkpoint SiT-XL-2-256x256.pt --out nets/sit
    python -m ism_jax.convert dit --checkpoint DiT-XL-2-256x256.pt --out nets/dit
    python -m ism_jax.convert shortcut --checkpoint shortcut.safetensors \
        --image_size 32 --out nets/shortcut
    python -m ism_jax.convert export --workdir runs/quickstart --out nets/mine

Each of these writes a folder with `model.safetensors` and `config.json`, described in
`ism_jax.interchange.exported_network`. `ism_jax.sample` and `ism_jax.evaluate` accept
the folder as their `--workdir`, and training can start from it:

    python -m ism_jax.train --config configs/x.py --config.train.init_from=nets/sit \
        --config.model.time_scale=1.0

`export` writes the inference EMA of a run, bit for bit. `sit` and `shortcut` give
networks that compute the same function up to rounding. So does `dit`, but DiT predicts
noise instead of a velocity, so the result can only initialise training. See
`official_sit`, `official_dit` and `official_shortcut` in `ism_jax.interchange`. The
official networks take latents of sd-vae-ft times 0.18215.

Three commands give a run to others. Two write it for programs without this package:

    python -m ism_jax.convert torch --workdir runs/quickstart --out nets/torch
    python -m ism_jax.convert torch --workdir runs/quickstart --steps 4 \
        --guidance 1.5 --out nets/sit.pt
    python -m ism_jax.convert stablehlo --workdir runs/quickstart --steps 4 \
        --out nets/sampler.bin

`torch` writes the network's weights and one module of PyTorch, which samples with any
steps and guidance scale. With `--steps` it writes the state dict of an official SiT
(`.pt` or `.safetensors`) for that number of steps and that guidance scale alone.
`stablehlo` writes a sampler for one number of steps, with its weights, that JAX runs on
a CPU, GPU or TPU at any batch size and guidance scale.

    python -m ism_jax.convert push --workdir runs/quickstart --repo user/name

`push` exports a run or an exported folder to the Hugging Face hub, with a model card
and a picture of samples; `ism_jax.load('user/name')` loads it. The access token is that
of `hf auth login` or of the variable HF_TOKEN.

Checkpoints are `.safetensors` files, or `.pt` files that PyTorch reads with
`weights_only`. If a file holds several trees, the EMA (`ema`) is used. Files that could
run code when they are loaded are rejected, including the checkpoints of
shortcut-models, which are pickles. If you trust one, write its tensors in an
environment in which shortcut-models runs:

    import pickle, numpy as np
    from flax.core import unfreeze
    from flax.traverse_util import flatten_dict
    from safetensors.numpy import save_file
    with open('checkpoint', 'rb') as file:
        # 'params' instead gives the weights that use_ema = 0 samples from.
        tree = pickle.load(file)['train_state']['params_ema']
    tensors = flatten_dict(unfreeze(tree), sep='/')
    save_file({k: np.array(v, np.float32) for k, v in tensors.items()},
              'shortcut.safetensors')
"""

from pathlib import Path
import shlex
import tempfile

from absl import flags

from ism_jax import config as config_lib
from ism_jax import config_check, model_card, sharing, trained_network
from ism_jax.interchange import (
    converted_network,
    exported_network,
    hub,
    official_dit,
    official_shortcut,
    official_sit,
    tensor_file,
)
from ism_jax.method import time_grid
from ism_jax.runtime import command_line, paths


def convert_sit(path, *, num_heads: int = 0) -> exported_network.ExportedNetwork:
    """The official SiT in a checkpoint.

    Args:
      path: `.pt` or `.safetensors` file.
      num_heads: attention heads; 0 for those of the preset with the same width and
        depth.

    Raises:
      ValueError: the file cannot be read safely or is not a SiT.
    """
    return _convert(
        path, official_sit.from_tensors, 'SiT', 'flow_matching', num_heads=num_heads
    )


def convert_dit(path, *, num_heads: int = 0) -> exported_network.ExportedNetwork:
    """The official DiT in a checkpoint, which predicts noise; see `convert_sit`."""
    network = _convert(
        path, official_dit.from_tensors, 'DiT', 'flow_matching', num_heads=num_heads
    )
    return network._replace(predicts='noise')


def convert_shortcut(
    path,
    *,
    image_size: int,
    base_steps: int = 128,
    guidance: float = 0.5,
    num_heads: int = 0,
) -> exported_network.ExportedNetwork:
    """The official shortcut model in a file of tensors.

    Args:
      path: `.safetensors` file.
      image_size: side of its images or latents.
      base_steps: its flag `denoise_timesteps`.
      guidance: guidance scale w of its targets: its `cfg_scale` - 1, or 0 without
        `bootstrap_cfg`.
      num_heads: see `convert_sit`.

    Raises:
      ValueError: the file is not a safetensors file or not a shortcut model.
    """
    path = Path(path)
    if path.is_file() and path.suffix != '.safetensors':
        raise ValueError(
            f'{path} is not a .safetensors file; checkpoints of shortcut-models are '
            'pickles, which can run arbitrary code when loaded. If you trust '
            'it, python -m ism_jax.convert --help shows how to write its tensors'
        )
    if not time_grid.is_base_steps(base_steps):
        raise ValueError(
            f'--base_steps = {base_steps} must be a power of two, at least 2'
        )
    return _convert(
        path,
        official_shortcut.from_tensors,
        'shortcut model',
        'shortcut',
        dict(base_steps=base_steps, guidance=guidance),
        image_size=image_size,
        base_steps=base_steps,
        num_heads=num_heads,
    )


def export(workdir, step: int | None = None) -> exported_network.ExportedNetwork:
    """The inference EMA of a run.

    Args:
      workdir: folder of the run.
      step: checkpoint to export; None for the latest.

    Raises:
      ValueError: there is no run or no such checkpoint.
    """
    workdir = paths.from_user(workdir, '--workdir')
    if exported_network.exists(workdir):
        raise ValueError(f'{workdir} is already an exported network; copy the folder')
    run = trained_network.load(workdir, step)
    return exported_network.ExportedNetwork(
        config=config_lib.to_dict(run.config),
        params=run.params,
        step=run.step,
        class_names=run.class_names,
        image_shape=run.image_shape,
        origin=f'ism_jax, {run.config.objective.name}, inference EMA',
    )


def push(
    workdir,
    repo: str,
    *,
    step: int | None = None,
    private: bool = False,
    license: str | None = None,
) -> list[str]:
    """Uploads a network to the Hugging Face hub, with a model card.

    Args:
      workdir: folder of a run or of an exported network.
      repo: hub id.
      step: checkpoint of a run; None for the latest.
      private: whether only the owner of the repository may see it.
      license: identifier of the hub for the card, such as 'mit'; None for none.

    Returns:
      Lines that say where the network is and how to load it.

    Raises:
      ValueError: there is no such network, or the hub refuses.
    """
    run = trained_network.load(workdir, step)
    if exported_network.exists(workdir):
        network = exported_network.read(workdir)
    else:
        network = export(workdir, step)
    address = hub.create(repo, private=private)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, network)
        model_card.write(folder, run, workdir=workdir, repo=repo, license=license)
        hub.upload(folder, repo, f'{network.origin}, step {network.step}')
    return [f'uploaded to {address}', f"load it with ism_jax.load('{repo}')"]


def write(folder, network: exported_network.ExportedNetwork) -> None:
    """Writes a network to a folder; see `exported_network.write`."""
    model = trained_network.exported_model(network)
    exported_network.write(folder, network, model)


def _convert(
    path, from_tensors, kind: str, objective: str, objective_options=None, **options
) -> exported_network.ExportedNetwork:
    """The network in a checkpoint, with a config to sample it."""
    tensors, tree = tensor_file.read(path)
    try:
        converted = from_tensors(tensors, **options)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return exported_network.ExportedNetwork(
        config=_resolved_config(converted, objective, objective_options or {}),
        params=converted.params,
        step=0,
        class_names=tuple(map(str, range(converted.num_classes))),
        image_shape=converted.image_shape,
        origin=f'{kind} of {Path(path).name}' + (f', {tree}' if tree else ''),
        fresh=converted.fresh,
    )


def _resolved_config(
    converted: converted_network.ConvertedNetwork, objective: str, options: dict
) -> dict:
    """A config without a data source, as a JSON object."""
    config = config_lib.default()
    side, _, channels = converted.image_shape
    config.data.update(source='', image_size=side, channels=channels)
    config.model.update(converted.model)
    config_lib.use_objective(config, objective, **options)
    config_check.validate(config)
    return config_lib.to_dict(config)


# Function and flags of the commands that write a network of ours; the first flag is the
# source.
NETWORKS = {
    'sit': (convert_sit, ('checkpoint', 'num_heads')),
    'dit': (convert_dit, ('checkpoint', 'num_heads')),
    'shortcut': (
        convert_shortcut,
        ('checkpoint', 'image_size', 'num_heads', 'base_steps', 'guidance'),
    ),
    'export': (export, ('workdir', 'step')),
}
# The same of the commands that give a run to others, and return lines to print.
SHARING = {
    'torch': (
        sharing.write_torch,
        ('workdir', 'out', 'step', 'steps', 'guidance', 'interval'),
    ),
    'stablehlo': (
        sharing.write_stablehlo,
        ('workdir', 'out', 'step', 'steps', 'interval'),
    ),
    'push': (push, ('workdir', 'repo', 'step', 'private', 'license')),
}
COMMANDS = {
    **{name: (function, (*f, 'out')) for name, (function, f) in NETWORKS.items()},
    **SHARING,
}
# Other fields of the model, which decide what parameters it has.
SHAPE_FIELDS = (
    'channel_multipliers',
    'blocks_per_level',
    'attention_levels',
    'interval_input',
    'velocity_head',
)
REQUIRED = ('checkpoint', 'image_size', 'workdir', 'out', 'repo')


def run(command: str, source, out, **options) -> None:
    """Converts one network, writes it, and prints how to train from it.

    `source` is a checkpoint or the folder of a run, and `options` are those of the
    command's function.
    """
    function, _ = NETWORKS[command]
    network = function(source, **options)
    write(out, network)
    print(f'wrote {network.origin}, which predicts {network.predicts}, to {out}/')
    print(f'train from it with {start_flags(network, out)}')


def start_flags(network: exported_network.ExportedNetwork, out) -> str:
    """Flags of `ism_jax.train` for a network like this that starts from `out`."""
    flags = [f'--config.train.init_from={out}']
    model = trained_network.exported_model(network)
    for name in (*exported_network.FUNCTION_FIELDS, *SHAPE_FIELDS):
        if hasattr(model, name):
            value = str(getattr(model, name)).replace(' ', '')
            flags.append(f'--config.model.{name}={value}')
    flags.append(f'--config.model.backbone={network.config["model"]["backbone"]}')
    return shlex.join(flags)


def run_command(command: str) -> None:
    """Runs a command with the flags of the command line."""
    _, names = COMMANDS[command]
    known = {name for _, taken in COMMANDS.values() for name in taken}
    foreign = sorted(name for name in known.difference(names) if FLAGS[name].present)
    if foreign:
        raise ValueError(
            f'--{foreign[0]} is not a flag of {command}, which takes '
            + ', '.join(f'--{name}' for name in names)
        )
    missing = [n for n in names if n in REQUIRED and FLAGS[n].value is None]
    if missing:
        raise ValueError(f'{command} needs --{missing[0]}; --help shows examples')
    values = {name: FLAGS[name].value for name in names if FLAGS[name].present}
    for name in values.keys() & {'out', 'workdir'}:
        values[name] = paths.from_user(values[name], f'--{name}')
    if 'interval' in values:
        values['interval'] = command_line.parse_numbers(values['interval'], float)
    if command in SHARING:
        print(*SHARING[command][0](**values), sep='\n')
    else:
        run(command, values.pop(names[0]), **values)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('checkpoint', None, 'File of the official network.')
    flags.DEFINE_string('workdir', None, 'Folder of the run to export.')
    flags.DEFINE_integer('step', None, 'Step of the checkpoint; default: the latest.')
    flags.DEFINE_integer('num_heads', 0, 'Attention heads; 0 for those of a preset.')
    flags.DEFINE_integer('image_size', None, 'Side of the images or latents.')
    flags.DEFINE_integer('base_steps', 128, 'denoise_timesteps of the shortcut model.')
    flags.DEFINE_float(
        'guidance',
        None,
        'Guidance scale w: of the official SiT that is written, or of the targets of '
        'the shortcut model, its cfg_scale - 1 (default 0.5; 0 without bootstrap_cfg).',
    )
    flags.DEFINE_integer('steps', None, 'Number of sampling steps.')
    flags.DEFINE_string(
        'interval', '', 'Start and end time of guidance, as 0.3,1, if it is an input.'
    )
    flags.DEFINE_string('out', None, 'Folder or file to write.')
    flags.DEFINE_string('repo', None, 'Repository on the Hugging Face hub.')
    flags.DEFINE_bool('private', False, 'Create the repository as a private one.')
    flags.DEFINE_string('license', None, 'Licence for the model card, such as mit.')
    command_line.run(run_command, commands=tuple(COMMANDS))
