r"""A run's programs, compiled for chips that need not exist, beside the plan of `cost`.

    python -m ism_jax.train --config configs/imagenet256_ism_xl2.py --plan \
        --topology v5p:2x2x4

XLA compiles the real train step, the coupling and the sampler. Memory, FLOPs, bytes and
collectives are those of the compiled programs. Times are estimates from the chip's
public peaks: nothing runs.
"""

from collections.abc import Callable
import json
import re
import time
from typing import Any

from absl import flags
import jax

from ism_jax import cost
from ism_jax.experiment import Experiment
from ism_jax.runtime import chips, compiled_program, files, paths, provenance, sharding

GIB = 2**30


def compile_plan(
    config, topology: str, num_classes: int, log: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Compiles the programs of a config for a topology.

    Args:
      config: a validated config.
      topology: see `chips.devices`.
      num_classes: number of classes of the data.
      log: called before each compilation, which takes minutes for large networks.

    Returns:
      The record of `record`.

    Raises:
      ValueError: see `chips.devices`; or a mesh that does not divide the chips.
    """
    chip, devices = chips.parse(topology), chips.devices(topology)
    plan = cost.make_plan(config, len(devices), num_classes, chip)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices=devices)
    side = config.data.image_size
    experiment = Experiment(
        config,
        mesh=mesh,
        num_classes=num_classes,
        image_shape=(side, side, config.data.channels),
    )
    programs = {}
    for name, lowered in experiment.lower_programs().items():
        log(f'compiling for {topology}: {name}')
        programs[name] = compile_program(lowered, experiment, chip)
    step = programs['train step']
    if 'seconds' in step:
        peak = plan.devices * chip.tflops * 1e12
        step['mfu'] = plan.flops_per_step / step['seconds'] / peak
    return record(plan, chip, topology, mesh, programs)


def define_flags() -> None:
    """The flags that `run_flags` reads."""
    flags.DEFINE_bool('plan', False, 'Only print what the run needs.')
    flags.DEFINE_string(
        'topology', '', 'Chips to compile the plan for, such as v5e:4x4 or h100:8.'
    )
    flags.DEFINE_string('plan_out', '', 'JSON file for the figures of --topology.')
    flags.DEFINE_enum(
        'plan_chip', 'h100', list(chips.CHIPS), 'Chip to plan for without --topology.'
    )
    flags.DEFINE_integer(
        'plan_devices', 8, 'Number of chips without --topology.', lower_bound=1
    )
    flags.DEFINE_integer('plan_classes', 1000, 'Classes of the data.', lower_bound=1)
    flags.DEFINE_float(
        'plan_tflops',
        None,
        'TFLOP/s that a chip sustains; by default 40 % of its peak.',
    )


def run_flags(values: flags.FlagValues, config) -> None:
    """Prints the plan of a config and, with `--topology`, its compiled programs.

    Raises:
      ValueError: see `compile_plan`.
    """
    # Nothing runs: an accelerator of this machine is left alone.
    jax.config.update('jax_platforms', 'cpu')
    topology, classes = values.topology, values.plan_classes
    if not topology:
        chip, devices = chips.CHIPS[values.plan_chip], values.plan_devices
        print(cost.report(config, devices, chip, classes, values.plan_tflops))
        return
    chip, devices = chips.parse(topology), len(chips.devices(topology))
    print(
        cost.report(config, devices, chip, classes, values.plan_tflops),
        end='\n\n',
        flush=True,
    )
    found = compile_plan(config, topology, classes)
    print(format_record(found))
    if does_not_fit(found):
        print(f'it does not fit: {cost.advice(config, devices, classes, chip)}')
    if values.plan_out:
        out = paths.local_path(values.plan_out, '--plan_out')
        files.write_bytes(out, json.dumps(found, indent=1).encode())


def does_not_fit(found: dict) -> bool:
    """Whether a program of a record needs more memory than the chip has."""
    return any(
        'refused' in p or p['memory']['peak'] > found['chip_memory']
        for p in found['programs'].values()
    )


def compile_program(lowered, experiment: Experiment, chip: chips.Chip) -> dict:
    """The figures of a lowered program on one chip.

    Returns:
      `compile_seconds`; and the figures of `Program.record` and `roofline`, or, of a
      program that XLA refuses because it does not fit, `refused`, the reason.
    """
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        reason = re.sub(r'\s+', ' ', str(error).partition('. ')[0])
        return {
            'compile_seconds': time.perf_counter() - started,
            'refused': reason.partition('RESOURCE_EXHAUSTED: ')[2],
        }
    seconds = time.perf_counter() - started
    shapes = compiled_program.parameter_shapes(experiment.abstract_state().params)
    program = compiled_program.read(compiled, shapes)
    return {'compile_seconds': seconds, **program.record(), **roofline(program, chip)}


def roofline(program: compiled_program.Program, chip: chips.Chip) -> dict[str, float]:
    """A lower bound of the time of a program, from the peaks of the chip.

    Each operation takes at least the time of its FLOPs at the peak, and that of its
    bytes at the full bandwidth of the memory. Collectives are assumed to use all links
    and to overlap with everything else.

    Returns:
      `seconds`; and its parts if only they took time: `compute_seconds`,
      `memory_seconds` and `link_seconds`.
    """
    flops, memory = chip.tflops * 1e12, chip.memory_gbps * 1e9
    link = sum(c.wire_bytes for c in program.collectives) / (chip.link_gbps * 1e9)
    chain = sum(max(o.flops / flops, o.bytes / memory) for o in program.operations)
    return {
        'seconds': max(chain, link),
        'compute_seconds': program.flops / flops,
        'memory_seconds': program.bytes / memory,
        'link_seconds': link,
    }


def record(plan: cost.Plan, chip: chips.Chip, topology: str, mesh, programs) -> dict:
    """All figures of a compiled plan, for JSON.

    Returns:
      `topology`, `mesh`, `chip`, `predicted` (bytes by part, see `cost.Plan`),
      `flops_per_step` on all chips without recomputation, `steps`, `programs` by name,
      `jax` and `commit`.
    """
    return {
        'topology': topology,
        'mesh': dict(mesh.shape),
        'chip': chip.name,
        'chip_memory': chip.memory,
        'predicted': plan.bytes_per_device,
        'parameters': plan.parameters,
        'flops_per_step': plan.flops_per_step,
        'steps': plan.steps,
        'programs': programs,
        'jax': jax.__version__,
        'commit': provenance.commit(),
    }


def format_record(found: dict) -> str:
    """The record as text."""
    predicted = sum(found['predicted'].values())  # The peak.
    lines = [
        f'compiled for {found["topology"]}, mesh data {found["mesh"]["data"]} x fsdp '
        f'{found["mesh"]["fsdp"]}, by JAX {found["jax"]}; all figures per chip',
        '',
        f'{"":34}{"predicted":>12}{"compiled":>12}',
    ]
    step = found['programs']['train step']
    if 'memory' in step:
        for name, size in step['memory'].items():
            planned = f'{predicted / GIB:.2f}' if name == 'peak' else ''
            label = f'train step, {name}, GiB'
            lines.append(f'{label:34}{planned:>12}{size / GIB:12.2f}')
    for name, program in found['programs'].items():
        lines += ['', f'{name}: compiled in {program["compile_seconds"]:.0f} s']
        lines += _program_lines(name, program)
    return '\n'.join(lines)


def _program_lines(name: str, program: dict) -> list[str]:
    if 'refused' in program:
        return [f'  does not fit: {program["refused"]}']
    lines = [
        f'  peak memory {program["memory"]["peak"] / GIB:.2f} GiB; '
        f'{program["flops"] / 1e12:.2f} TFLOP; {program["bytes"] / GIB:.1f} GiB moved'
    ]
    if program['unknown_loops']:
        lines.append(
            f'  {program["unknown_loops"]} loops stop at a tolerance; each counts once'
        )
    for c in program['collectives']:
        if c['bytes'] >= 2**20:
            lines.append(
                f'  {c["kind"]:20}{c["content"]:12}{c["dtype"]:6}{c["count"]:6} times'
                f'{c["bytes"] / GIB:9.3f} GiB'
            )
    if name == 'train step':
        lines.append(
            f'  estimated from the peaks of the chip, not measured: at least '
            f'{1000 * program["seconds"]:.0f} ms (products '
            f'{1000 * program["compute_seconds"]:.0f}, memory '
            f'{1000 * program["memory_seconds"]:.0f}, links '
            f'{1000 * program["link_seconds"]:.0f}), at most {program["mfu"]:.0%} of '
            'the peak'
        )
    return lines
