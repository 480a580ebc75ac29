"""Converts networks: official checkpoints into ours, and ours into portable files.

    python -m ism_jax.convert sit --checkpoint SiT-XL-2-256x256.pt --out nets/sit
    python -m ism_jax.convert dit --checkpoint DiT-XL-2-256x256.pt --out nets/dit
    python -m ism_jax.convert shortcut --checkpoint shortcut.safetensors \\
        --image_size 32 --out nets/shortcut
    python -m ism_jax.convert export --workdir runs/quickstart --out nets/mine

Each writes a folder with `model.safetensors` and `config.json` (see
`ism_jax.interchange.exported_network`), which is the way back too: `ism_jax.sample` and `ism_jax.evaluate`
take it as their `--workdir`, and a training starts from it:

    python -m ism_jax.train --config configs/x.py --config.train.init_from=nets/sit \\
        --config.model.time_scale=1.0

`export` writes the slow average of a run, bit for bit. What the others compute in our
network is in `ism_jax.interchange.official`: SiT and shortcut models exactly, to rounding; DiT
too, but it predicts noise and not a velocity, so it can start a training and nothing
more. The official networks see latents of sd-vae-ft times 0.18215.

Checkpoints are `.safetensors`, or `.pt` read with PyTorch's `weights_only`: of several
trees in it the average, `ema`, is taken. What could run a program when it is loaded is
refused. That is so for the checkpoints of shortcut-models, which are pickles. Who
trusts one can write its tensors, in an environment where shortcut-models runs:

    import pickle, numpy as np
    from flax.core import unfreeze
    from flax.traverse_util import flatten_dict
    from safetensors.numpy import save_file
    with open('checkpoint', 'rb') as file:
        # Or 'params', which its own sampling takes with use_ema = 0.
        tree = pickle.load(file)['train_state']['params_ema']
    tensors = flatten_dict(unfreeze(tree), sep='/')
    save_file({k: np.array(v, np.float32) for k, v in tensors.items()},
              'shortcut.safetensors')
"""

from pathlib import Path

from absl import app, flags

from ism_jax import config as config_lib
from ism_jax import trained_network
from ism_jax.interchange import exported_network, official, tensor_file
from ism_jax.method import time_grid
from ism_jax.runtime import command_line


def convert_sit(path, *, num_heads: int = 0) -> exported_network.Network:
    """The official SiT in a file.

    Args:
      path: `.pt` or `.safetensors`.
      num_heads: 0 where width and depth are those of a preset.

    Raises:
      ValueError: the file cannot be read safely, or is not a SiT.
    """
    tensors, tree = tensor_file.read(path)
    converted = _named(path, official.from_sit, tensors, num_heads)
    return _network(converted, 'flow_matching', _origin('SiT', path, tree))


def convert_dit(path, *, num_heads: int = 0) -> exported_network.Network:
    """The official DiT in a file, which predicts noise; see `convert_sit`."""
    tensors, tree = tensor_file.read(path)
    converted = _named(path, official.from_dit, tensors, num_heads)
    network = _network(converted, 'flow_matching', _origin('DiT', path, tree))
    return network._replace(predicts='noise')


def convert_shortcut(
    path,
    *,
    image_size: int,
    base_steps: int = 128,
    guidance: float = 0.5,
    num_heads: int = 0,
) -> exported_network.Network:
    """The official shortcut model in a file of tensors.

    Args:
      path: `.safetensors`.
      image_size: side of its images or latents.
      base_steps: its `denoise_timesteps`.
      guidance: of its targets: its `cfg_scale` - 1, or 0 without `bootstrap_cfg`.
      num_heads: see `convert_sit`.

    Raises:
      ValueError: the file is not of tensors, or not of a shortcut model.
    """
    path = Path(path)
    if path.is_file() and path.suffix != '.safetensors':
        raise ValueError(
            f'{path} is not a .safetensors file. Checkpoints of shortcut-models are '
            'pickles, which can run any program when they are loaded, and are not '
            'read; python -m ism_jax.convert --help says how to write the tensors of '
            'one that you trust'
        )
    time_grid.check_base_steps(base_steps, '--base_steps')
    tensors, tree = tensor_file.read(path)
    converted = _named(
        path, official.from_shortcut, tensors, image_size=image_size,
        base_steps=base_steps, num_heads=num_heads,
    )  # fmt: skip
    origin = _origin('shortcut model', path, tree)
    return _network(
        converted, 'shortcut', origin, base_steps=base_steps, guidance=guidance
    )


def export(workdir, step: int | None = None) -> exported_network.Network:
    """The slow average of a run.

    Args:
      workdir: of the run.
      step: which checkpoint; None for the latest.

    Raises:
      ValueError: there is no run, or no such checkpoint.
    """
    if exported_network.exists(workdir):
        raise ValueError(f'{workdir} is portable already; copy the folder')
    run = trained_network.load(workdir, step)
    return exported_network.Network(
        config=run.config, params=run.params, step=run.step,
        class_names=run.class_names, image_shape=run.image_shape,
        origin=f'ism_jax, {run.config.objective.name}, slow average',
    )  # fmt: skip


def _named(path, convert, tensors, *args, **kwargs) -> official.Converted:
    try:
        return convert(tensors, *args, **kwargs)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def _origin(kind: str, path, tree: str) -> str:
    return f'{kind} of {Path(path).name}' + (f', {tree}' if tree else '')


def _network(
    converted: official.Converted, method: str, origin: str, **options
) -> exported_network.Network:
    """With a config from which it can be sampled; its data are not known."""
    config = config_lib.default()
    config.data.update(
        source='', image_size=converted.image_shape[0],
        channels=converted.image_shape[-1],
    )  # fmt: skip
    config.model.update(converted.model)
    config_lib.use_objective(config, method, **options)
    config_lib.validate(config)
    return exported_network.Network(
        config=config,
        params=converted.params,
        step=0,
        class_names=tuple(map(str, range(converted.num_classes))),
        image_shape=converted.image_shape,
        origin=origin,
        fresh=converted.fresh,
    )


# The function of each command, and its flags besides --out, the source first.
COMMANDS = {
    'sit': (convert_sit, ('checkpoint', 'num_heads')),
    'dit': (convert_dit, ('checkpoint', 'num_heads')),
    'shortcut': (
        convert_shortcut,
        ('checkpoint', 'image_size', 'num_heads', 'base_steps', 'guidance'),
    ),
    'export': (export, ('workdir', 'step')),
}
REQUIRED = ('checkpoint', 'image_size', 'workdir')


def run_command(name: str) -> None:
    """Does what the command line says after the command's name."""
    make, taken = COMMANDS[name]
    for flag in sorted({flag for _, names in COMMANDS.values() for flag in names}):
        if FLAGS[flag].present and flag not in taken:
            raise ValueError(
                f'--{flag} is no flag of {name}, which takes --out and '
                + ', '.join(f'--{other}' for other in taken)
            )
    for flag in taken:
        if flag in REQUIRED and FLAGS[flag].value is None:
            raise ValueError(f'{name} needs --{flag}; --help shows examples')
    source, *options = taken
    network = make(
        FLAGS[source].value, **{option: FLAGS[option].value for option in options}
    )
    exported_network.write(FLAGS.out, network)
    print(f'wrote {network.origin}, which predicts {network.predicts}, to {FLAGS.out}/')
    fields = [f for f in exported_network.FUNCTION_FIELDS if f in network.config.model]
    print(
        f'train from it with --config.train.init_from={FLAGS.out} '
        + ' '.join(f'--config.model.{f}={network.config.model[f]}' for f in fields)
    )


def main(argv):
    def no_command():
        raise ValueError(
            f'give one of the commands {", ".join(COMMANDS)}; --help shows examples'
        )

    if argv[1:2] and argv[1] in COMMANDS:
        command_line.main(lambda: run_command(argv[1]))(argv[:1] + argv[2:])
    else:
        command_line.main(no_command)(argv[:1])


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('checkpoint', None, 'File of the official network.')
    flags.DEFINE_string('workdir', None, 'Folder of the run to export.')
    flags.DEFINE_integer('step', None, 'Checkpoint; the latest if not given.')
    flags.DEFINE_integer('num_heads', 0, 'Attention heads, if of no preset.')
    flags.DEFINE_integer('image_size', None, 'Side of the images or latents.')
    flags.DEFINE_integer('base_steps', 128, 'Of the shortcut model: 1 / finest step.')
    flags.DEFINE_float('guidance', 0.5, 'Of its targets: scale - 1, or 0 for none.')
    flags.DEFINE_string('out', None, 'Folder to write to.', required=True)
    app.run(main)
