"""Trained networks for others: PyTorch weights and serialized samplers."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ism_jax import config_check, trained_network
from ism_jax.interchange import official_sit, serialized_sampler, torch_network
from ism_jax.method import time_grid
from ism_jax.models import sit
from ism_jax.runtime import files, paths


def write_torch(
    workdir,
    out,
    *,
    step: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    interval: tuple[float, float] | None = None,
) -> list[str]:
    """Writes a network for PyTorch, see `interchange.torch_network`.

    Args:
      workdir: folder of a run or of an exported network.
      out: file of an official SiT; without `steps`, a folder for the whole network.
      step: checkpoint; None for the latest.
      steps: number of equal sampling steps of the official SiT.
      guidance: its guidance scale w; None for 0 or the lowest that was trained.
      interval: its start and end time of guidance, if the network is conditioned on
        them; None for the method's default.

    Returns:
      Lines that say what was written and how to use it.

    Raises:
      ValueError: the network or its sampler cannot be written so, or was not trained
        for these steps and this guidance scale.
    """
    run = trained_network.load(workdir, step)
    if type(run.model) is not sit.SiT:
        raise ValueError(
            f'model.backbone = {run.config.model.backbone!r} cannot be written for '
            "PyTorch; only 'sit' can"
        )
    if steps is None and (guidance is not None or interval is not None):
        raise ValueError(
            '--guidance and --interval belong to an official SiT, which also needs '
            '--steps; the whole network takes any'
        )
    if steps is None:
        return _write_whole(run, paths.to_path(out))
    return _write_official(run, paths.to_path(out), steps, guidance, interval)


def _write_official(run, out, steps, guidance, interval) -> list[str]:
    objective = run.experiment().objective
    guidance = objective.guidance_range[0] if guidance is None else guidance
    config_check.check_guidance(objective, (guidance,))
    config_check.check_interval(objective, interval)
    sizes = objective.schedule(steps)
    if len(set(sizes)) > 1:
        raise ValueError(
            f'--steps {steps} are not of one size; for this network give 1, 2, 4, ..., '
            f'{objective.base_steps}'
        )
    condition = objective.step_condition(sizes[0], guidance)
    if condition is None:
        raise _not_plain(run, f' in {steps} steps at guidance {guidance:g}')
    d, w = map(float, condition)
    params = torch_network.fold(
        run.model, run.params, d=d, w=w, interval=interval or objective.default_interval
    )
    tensors = official_sit.to_tensors(params, run.model.patch_size, run.image_shape)
    torch_network.write_official(out, tensors)
    model, (side, _, channels) = run.model, run.image_shape
    scale = f'{model.time_scale:g} * ' if model.time_scale != 1 else ''
    return [
        f'wrote {out}, an official SiT for {steps} steps at guidance {guidance:g}:',
        f'  model = SiT(input_size={side}, patch_size={model.patch_size}, '
        f'in_channels={channels}, hidden_size={model.hidden_size}, '
        f'depth={model.depth}, num_heads={model.num_heads}, '
        f'mlp_ratio={model.mlp_ratio:g}, num_classes={model.num_classes}, '
        'learn_sigma=False)',
        f'  for i in range({steps}):  # t: [B]; x: [B, C, H, W], noise at first',
        f'      t = torch.full((len(x),), {scale}i / {steps})',
        f'      x = x + model(x, t, labels) / {steps}',
    ]


def _write_whole(run, out) -> list[str]:
    objective = run.experiment().objective
    coarse = objective.step_condition(1.0, 1.0)
    if coarse is None:
        raise _not_plain(run, '')
    finest = objective.step_condition(1 / objective.base_steps, 1.0)
    low, high = objective.guidance_range
    options = dict(
        dyadic=objective.dyadic,
        base_steps=objective.base_steps,
        max_steps=objective.base_steps // (1 if finest else 2),
        guidance_range=[float(low), float(high)],
        guidance_input=bool(coarse[1]),
        interval=[float(time) for time in objective.default_interval],
    )
    torch_network.write_whole(out, run.model, run.params, run.image_shape, options)
    size = (out / torch_network.WEIGHTS).stat().st_size
    return [
        f'wrote {out}/{torch_network.WEIGHTS} ({size / 1e6:.1f} MB) and '
        f'{torch_network.MODULE}; in that folder:',
        '  import torch, ism_torch',
        f"  model = ism_torch.load('{torch_network.WEIGHTS}')",
        '  images = ism_torch.sample(model, torch.tensor([0]), steps=4)',
    ]


def _not_plain(run, setting: str) -> ValueError:
    return ValueError(
        f'objective.name = {run.config.objective.name!r} cannot be written for '
        f'PyTorch{setting}: a step of its sampler is not one call of the network'
    )


def write_stablehlo(
    workdir,
    out,
    *,
    step: int | None = None,
    steps: int = 4,
    interval: tuple[float, float] | None = None,
) -> list[str]:
    """Writes a sampler that runs without this package: see `serialized_sampler`.

    Args:
      workdir, step, interval: see `write_torch`.
      out: file to write.
      steps: number of sampling steps.

    Returns:
      Lines that say what was written and how to use it.

    Raises:
      ValueError: the method adds noise between steps, the network was not trained for
        these steps, or the file would be too large.
    """
    run = trained_network.load(workdir, step)
    experiment = run.experiment()
    objective = experiment.objective
    if not objective.deterministic:
        raise ValueError(
            f'objective.name = {run.config.objective.name!r} adds noise between steps, '
            'so its sampler cannot be written as a function of the noise'
        )
    config_check.check_interval(objective, interval)
    times, sizes = time_grid.times_and_sizes(objective.schedule(steps))
    interval = np.asarray(interval or objective.default_interval, np.float32)
    decode = experiment.make_decoder() or (lambda latents: latents)
    # One kernel for all platforms.
    model = dataclasses.replace(run.model, attention='xla')

    def sample(params, noise, labels, guidance):
        def apply(params, *inputs):
            return model.apply({'params': params}, *inputs)

        network = objective.at_interval(apply, interval)
        w = jnp.broadcast_to(guidance, labels.shape)
        options = noise, labels, w, jnp.asarray(times), jnp.asarray(sizes), None
        return decode(objective.sample(network, params, *options))

    content = serialized_sampler.serialize(sample, run.params, run.image_shape)
    files.write_bytes(paths.to_path(out), content)
    shape = ', '.join(map(str, run.image_shape))
    low, high = objective.guidance_range
    return [
        f'wrote {out}, {len(content) / 1e6:.2f} MB with its weights, for '
        f'{", ".join(serialized_sampler.PLATFORMS)}; it needs jax and flatbuffers:',
        '  from jax import export',
        f"  sampler = export.deserialize(open('{out}', 'rb').read())",
        f'  # noise [B, {shape}] float32; labels [B] int32, {len(run.class_names)} is '
        f'null; guidance {low:g} .. {high:g}',
        '  images = sampler.call(noise, labels, np.float32(guidance))',
    ]
