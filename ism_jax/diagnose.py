"""Diagnoses a run: `python -m ism_jax.diagnose --workdir runs/quickstart`.

Looks for the five faults of shortcut models (iSM, arXiv 2510.21250) with the numbers
of `ism_jax.diagnosis.diagnostics` and writes `report.html` into the workdir: one file, with a
table of what was found and a section with a plot for each fault. What does not apply
to the run's method says so.

    python -m ism_jax.diagnose compounding [--workdir runs/shortcut]

measures proposition 1 by itself: in a flow known in closed form, and with --workdir in
a trained network. Prints a table over N = 1, 2, 4, ..., 128 smallest steps in a jump.
"""

from collections.abc import Callable, Mapping
import math
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ism_jax import config as config_lib
from ism_jax import experiment, trained_network
from ism_jax.data import sources
from ism_jax.diagnosis import diagnostics, report
from ism_jax.method import gaussian_flow, interpolant, random_streams, time_grid
from ism_jax.models import sit
from ism_jax.objectives import base
from ism_jax.runtime import command_line, files, sharding
from ism_jax.sampling.sampler import Sampler
from ism_jax.training import checkpoint, paired_pool
from ism_jax.transport import coupling

# Where a method sets no limit, responses are looked at up to here (the paper's w_max).
GUIDANCE_MAX = 3.5
# Guidance at which compounding is looked for, where it may be chosen.
COMPOUNDING_GUIDANCE = 1.5
STEP_COUNTS = (1, 2, 4, 8, 128)
# Spectra need many samples; paths and responses are many steps of few samples.
FEW_SAMPLES = 64
# The closed-form flow of `compounding`: its classes, and how many points are looked at.
NUM_CLASSES, CLOSED_FORM_SHAPE, CLOSED_FORM_SAMPLES = 4, (4, 4, 1), 64
CLOSED_FORM_SCALE = 1.5
DATA_STD = 0.5


class Subject(NamedTuple):
    """A run and what it is looked at with.

    Attributes:
      name: of the method.
      objective: the method.
      sampler: makes samples.
      params: the slow average.
      velocity: (params, x, t, d, w, label) -> mean velocity, compiled.
      noise, data, label: paired as in training; [n, H, W, C] and [n].
      pairs: how many of them are one pool.
      coupling: how they were paired, in words.
      averages: name -> parameters, 'online' first; the slow average's is 'infer'.
      seed: of all that is drawn here.
    """

    name: str
    objective: base.BaseObjective
    sampler: Sampler
    params: Any
    velocity: Callable[..., jax.Array]
    noise: np.ndarray
    data: np.ndarray
    label: np.ndarray
    pairs: int
    coupling: str
    averages: Mapping[str, Any]
    seed: int

    def field(self, x, t, label):
        """The smallest step's velocity without guidance."""
        d = jnp.full_like(t, 1 / self.objective.base_steps)
        return self.velocity(self.params, x, t, d, jnp.zeros_like(t), label)

    def guidances(self) -> tuple[float, float]:
        """Lowest and highest strength that is looked at."""
        low, high = self.objective.guidance_range
        return low, min(high, max(low, GUIDANCE_MAX))

    def some(self, num: int):
        """The first `num` noises, data and labels, as arrays of JAX."""
        return (jnp.asarray(x[:num]) for x in (self.noise, self.data, self.label))

    def samples(self, steps: int, w: float, num: int) -> np.ndarray:
        """Samples of the labels of the data, [num, H, W, C]; always the same noise."""
        batches = self.sampler.batches(
            self.params, jax.random.key(self.seed), self.label[:num], guidance=w,
            schedule=time_grid.dyadic_schedule(steps, self.objective.base_steps),
        )  # fmt: skip
        return np.concatenate([np.asarray(images) for images, _ in batches])

    def field_scale(self) -> float:
        """Guidance scale that the smallest step has even where none is asked for."""
        low, high = self.objective.guidance_range
        if low != high or not low:
            return 1.0
        noise, _, label = self.some(4)
        t = jnp.full(label.shape, 0.5)
        d = jnp.full(label.shape, 1 / self.objective.base_steps)
        with_w, without = (
            np.asarray(self.velocity(self.params, noise, t, d, w + 0 * t, label))
            for w in (low, 0.0)
        )
        return 1 + low if np.array_equal(with_w, without) else 1.0

    def step_counts(self) -> list[int]:
        return [n for n in STEP_COUNTS if n <= self.objective.base_steps]


def load_subject(workdir, step: int | None, samples: int) -> tuple[Subject, int]:
    """A run with at least `samples` of its data; and how long it was trained.

    Raises:
      ValueError: no run, no such checkpoint, its data are missing.
    """
    run = trained_network.load(workdir, step)
    config = run.config
    num_classes = len(run.class_names)
    objective = config_lib.make_objective(config, num_classes)
    noise, data, label, pairs = _paired_data(config, num_classes, samples)
    coupling = 'independent'
    if config.transport.enabled:
        scope = 'per class' if config.transport.per_class else 'over all classes'
        coupling = f'optimal transport {scope}, pools of {pairs:,}'
    return Subject(
        name=config.objective.name,
        objective=objective,
        sampler=experiment.make_sampler(
            config, objective, run.apply, run.image_shape,
            batch_size=min(config.sample.batch_size, samples),
        ),
        params=run.params,
        velocity=jax.jit(
            lambda params, *inputs: objective.velocity(run.apply, params, *inputs)
        ),
        noise=noise, data=data, label=label, pairs=pairs, coupling=coupling,
        averages=load_averages(workdir, run), seed=config.seed,
    ), run.step  # fmt: skip


def load_averages(workdir, run: trained_network.TrainedNetwork) -> dict[str, Any]:
    """Online parameters and averages of a checkpoint: {'online', 'target', 'infer'}.

    Without a second average 'target' is missing: 'infer' makes the targets too.

    Raises:
      ValueError: a folder that holds the slow average alone.
    """
    if not checkpoint.saved_steps(workdir):
        raise ValueError(
            f'{workdir} holds one network without the other averages; give the '
            '--workdir of the run that it was exported from'
        )
    place = sharding.replicated(sharding.local_mesh())
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        sit.abstract_params(run.model, run.image_shape),
    )
    names = {'params': abstract} | ({'target': abstract} if run.config.ema.twin else {})
    folder = Path(workdir).absolute() / 'checkpoints'
    with ocp.CheckpointManager(folder) as manager:
        restored = manager.restore(
            run.step,
            args=ocp.args.Composite(
                # Not the optimizer's state, which is twice as large.
                state=ocp.args.PyTreeRestore(
                    item=names,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(names),
                    partial_restore=True,
                )
            ),
        )['state']
    averages = {'online': restored['params']}
    if 'target' in names:
        averages['target'] = restored['target']
    return averages | {'infer': run.params}


def _paired_data(config, num_classes: int, samples: int):
    """Noise, data and labels of as many pools as hold `samples`; size of a pool."""
    source = sources.make_source(
        config.data.source, **config_lib.source_options(config)
    )
    batches = experiment.pool_batches(config)
    if not config.transport.enabled:
        batches = max(1, math.ceil(samples / config.train.batch_size))
    # Of one device: pairings do not depend on the mesh, and this serves any.
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    key = jax.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
    couple = experiment.make_coupling(config, mesh, num_classes)
    loader = experiment.make_loader(config, source, batches=batches)
    size = batches * config.train.batch_size
    parts = []
    try:
        for _ in range(math.ceil(samples / size)):
            pool, _ = paired_pool.next_pool(loader, couple, mesh, key)
            noise = coupling.pool_noise(
                random_streams.stream(key, random_streams.NOISE, pool.number),
                pool.noise_index.reshape(size),
                pool.images.shape[2:],
            )
            images = pool.images.reshape(size, *pool.images.shape[2:])
            parts.append([np.asarray(x) for x in (noise, images, pool.labels.ravel())])
    finally:
        loader.close()
    return *(np.concatenate(arrays) for arrays in zip(*parts)), size


# The five diagnoses.


def diagnose_compounding(subject: Subject, closed: Mapping) -> report.Section:
    """Section of fault 1; `closed` is of `closed_form_compounding`."""
    low, high = subject.guidances()
    w = low if low == high else min(COMPOUNDING_GUIDANCE, high)
    about = dict(
        fault='Compounding guidance',
        question='Does a long step carry the guidance that was asked for?',
        good='the scale asked for, at every N',
        text='Guidance pushes samples towards their class with a scale g. Where a '
        'method applies it again at each of its doublings of the step, a step of N '
        'smallest ones is pushed with g to the power log2 N: 17 in place of 1.5.',
    )
    if not w or not subject.objective.conditions_on_step:
        why = 'no guidance' if not w else 'no steps of different sizes'
        return report.Section(
            number='does not apply',
            verdict=f'{subject.name} has {why}',
            grade='none',
            figure=report.compounding_figure(
                {'A flow known exactly': (CLOSED_FORM_SCALE, closed)}
            ),
            caption='Measured in a flow that is known in closed form, for comparison.',
            **about,
        )
    asked = 1 + w
    scales = measure_compounding(subject, w)
    known = [n for n, found in scales.items() if found.is_clear()]
    if known:
        last = known[-1]
        ratio = scales[last].scale / asked
        growth = scales[last].scale / scales[known[0]].scale
        number = f'g = {scales[last].scale:.2f} at N = {last}, asked for {asked:g}'
        grade = _grade(abs(math.log(ratio)) if ratio > 0 else 9, 0.15, 0.5)
        if grade == 'good':
            verdict = 'long steps have the guidance asked for'
        elif ratio > 1:
            verdict = f'guidance of long steps is {ratio:.2g} times the one asked for'
        else:
            grade = 'fair'  # A fault, but not this one.
            where = 'in long steps' if growth < 0.8 else 'at all sizes of steps'
            verdict = f'guidance is weaker than asked for {where}'
        if last < subject.objective.base_steps:
            verdict += '; longer ones are not like guided steps of any scale'
    else:
        number, grade = 'undetermined', 'none'
        verdict = 'jumps are not like guided steps of any scale: train for longer'
    return report.Section(
        number=number,
        verdict=verdict,
        grade=grade,
        figure=report.compounding_figure(
            {
                'This network': (asked, {subject.name: scales}),
                'A flow known exactly': (CLOSED_FORM_SCALE, closed),
            }
        ),
        caption='Scale whose N smallest steps are most like one jump over them. Hollow '
        'points: no scale explains half of the jump.',
        **about,
    )


def measure_compounding(
    subject: Subject, w: float
) -> dict[int, diagnostics.EffectiveScale]:
    """Effective scale of the network's own jumps, N -> what was found."""
    noise, data, label = subject.some(FEW_SAMPLES // 2)
    objective = subject.objective
    return diagnostics.compounding(
        lambda x, t, d: subject.velocity(
            subject.params, x, t, d, jnp.full_like(t, w), label
        ),
        subject.field,
        noise,
        data,
        label,
        null=objective.num_classes,
        base_steps=objective.base_steps,
        interval=objective.guidance_interval,
        field_scale=subject.field_scale(),
        start_time=objective.start_time,
        seed=subject.seed,
    )


def diagnose_response(subject: Subject) -> report.Section:
    """Section of fault 2."""
    low, high = subject.guidances()
    about = dict(
        fault='Inflexible guidance',
        question='Can the strength of guidance be chosen when sampling?',
        good='moves as far as with CFG, farther with each raise of w',
        text='Users trade variety for clarity by turning the guidance strength w. A '
        'shortcut model has it baked in during training, so turning does nothing; '
        'iSM takes w as an input and should answer like classifier-free guidance '
        '(CFG), which needs two network calls in each of many small steps.',
    )
    if not high:
        return report.Section(
            number='does not apply', verdict=f'{subject.name} has no guidance',
            grade='none', **about,
        )  # fmt: skip
    baked = low == high
    num = min(FEW_SAMPLES, len(subject.label))
    strengths = np.linspace(*((0, GUIDANCE_MAX) if baked else (low, high)), 8)
    reference = _guided_samples(subject, strengths, num)
    expected = diagnostics.guidance_response(reference)
    responses, strips = {}, {}
    counts = [n for n in (1, 4) if n <= subject.objective.base_steps]
    for steps in counts:
        name = f'{steps} step' if steps == 1 else f'{steps} steps'
        if baked:
            responses[name] = np.zeros(len(strengths))
            continue
        samples = np.stack([subject.samples(steps, w, num) for w in strengths])
        response = diagnostics.guidance_response(samples)
        responses[name] = response.distance
        size, cosine = diagnostics.displacement_agreement(samples, reference)
        if samples.shape[-1] in (1, 3):
            strips = {strengths[i]: samples[i, :5] for i in (0, 2, 4, 7)}
    if baked:
        number = f'no move at all: w = {low:g} is baked in'
        grade, verdict = 'poor', 'w cannot be chosen when sampling'
    else:
        number = (
            f'{100 * size:.0f} % as far as CFG at w = {high:g} in {counts[-1]} steps '
            f'(cosine {cosine:.2f}); {100 * response.monotone:.0f} % of raises move on'
        )
        same = response.monotone >= 0.8 and cosine >= 0.5
        grade = _grade(abs(math.log(max(size, 1e-9))), 0.4, 1.1) if same else 'poor'
        verdict = {
            'good': 'answers to w like CFG',
            'fair': f'answers to w, {"less" if size < 1 else "more"} than CFG',
            'poor': 'does not answer to w like CFG',
        }[grade]
    return report.Section(
        number=number, verdict=verdict, grade=grade,
        figure=report.response_figure(
            strengths, responses, expected.distance, strips
        ),
        caption='RMS distance per pixel (black to white is 2) of samples from those of '
        'the lowest w; same noise and labels. Dashed: small steps of the same '
        "network's velocity with CFG of scale 1 + w"
        + (f'. Right: {counts[-1]} steps.' if strips else '.'),
        **about,
    )  # fmt: skip


def _guided_samples(subject: Subject, strengths, num: int) -> np.ndarray:
    """Samples by smallest steps with classifier-free guidance, [G, num, H, W, C]."""
    objective = subject.objective
    _, _, label = subject.some(num)
    steps = objective.base_steps
    noise = _sample_noise(subject, num)
    t = jnp.full(label.shape, objective.start_time)

    @jax.jit
    def end(scale):
        velocity = diagnostics.guided_steps(
            subject.field, noise, t, 1 - t, label, null=objective.num_classes,
            scale=scale, steps=steps,
            interval=objective.guidance_interval,
        )  # fmt: skip
        return noise + (1 - t)[:, None, None, None] * velocity

    scale = subject.field_scale()
    return np.stack([np.asarray(end((1 + w) / scale)) for w in strengths])


def _sample_noise(subject: Subject, num: int) -> jax.Array:
    """The noises that the sampler starts from."""
    return subject.sampler.noise(jax.random.key(subject.seed), np.arange(num))


def diagnose_frequencies(subject: Subject, num: int) -> report.Section:
    """Section of fault 3."""
    low, _ = subject.guidances()
    images = subject.data[:num]
    see = lambda x: np.clip(x, -1, 1) if x.shape[-1] in (1, 3) else x
    frequencies, power = diagnostics.radial_power(images)
    _, first = diagnostics.radial_power(images[::2])
    _, second = diagnostics.radial_power(images[1::2])
    # Halves are half as many as the samples and both vary: a factor of sqrt(2) each.
    floor = np.abs(diagnostics.log_ratio(first, second)) / math.sqrt(2)
    upper = frequencies > frequencies[-1] / 2
    levels = diagnostics.level_power(images)
    spectra, level_ratios, errors = {}, {}, {}
    for steps in subject.step_counts():
        samples = see(subject.samples(steps, low, num))
        spectra[steps] = diagnostics.radial_power(samples)[1]
        level_ratios[steps] = diagnostics.log_ratio(
            diagnostics.level_power(samples), levels
        )
        errors[steps] = diagnostics.high_frequency_error(samples, images)
    mean = float(np.mean(list(errors.values())))
    few = [n for n in (1, 4, max(errors)) if n in errors]
    grade = _grade(mean, 0.2, 0.7)
    high = np.mean([np.log(p / power)[upper].mean() for p in spectra.values()])
    lacks = 'too much' if high > 0 else 'too little'
    return report.Section(
        fault='Frequency bias',
        question='Is fine detail as strong in samples as in the data?',
        number='|log ratio| '
        + ', '.join(f'{errors[n]:.2f} ({n} step{"s" * (n > 1)})' for n in few),
        good=f'0, up to the chance of {floor[upper].mean():.2f}; 0.69 is twice or half',
        verdict={
            'good': 'detail is as strong as in the data',
            'fair': f'{lacks} detail, by a factor of {math.exp(mean):.2f}',
            'poor': f'far {lacks} detail, by a factor of {math.exp(mean):.2f}',
        }[grade],
        grade=grade,
        text='Any image is a sum of waves, long ones for the layout and short ones for '
        'edges and texture. Squared error cares little for short waves, so samples '
        'may look smooth or noisy though the layout is right.',
        figure=report.spectrum_figure(
            frequencies, power, spectra, level_ratios, floor
        ),
        caption=f'{len(images)} samples at w = {low:g} against as many of the data, of '
        'the same classes. Shaded: upper half of frequencies, of which the number is '
        'the mean; grey band: what chance does to the data themselves.',
    )  # fmt: skip


def diagnose_consistency(subject: Subject) -> report.Section:
    """Section of fault 4."""
    errors = {}
    if subject.objective.conditions_on_step:
        errors = _consistency_errors(subject)
    online = subject.averages['online']
    lags = {}
    for name, params in subject.averages.items():
        if name != 'online':
            label = {'target': 'target average', 'infer': 'slow average'}[name]
            lags[label] = _lags(subject, params, online)
    teacher = next(iter(lags.values()))
    lag = f'{100 * teacher["parameters"]:.2g} % in parameters'
    outputs = [v for k, v in teacher.items() if k != 'parameters']
    lag += f', {100 * max(outputs):.2g} % in outputs'
    about = dict(
        fault='Divergent self-consistency',
        question='Does one step agree with its two halves, and the teacher with its '
        'pupil?',
        good='error below 0.1 and shrinking with the step; lag of few percent',
        text='A network that jumps learns long steps from two half steps of a slower '
        'copy of itself, the target. If the copy lags far behind, it teaches what the '
        'network no longer believes, and one step and its halves drift apart.',
        figure=report.consistency_figure(errors, lags),
        caption='Left: RMS of one step minus its two halves, relative to the step. '
        'Right: distance of the averages from the online network; outputs on the same '
        'inputs.' if errors else 'Distance of the averages from the online network.',
    )  # fmt: skip
    used = subject.objective.uses_target_ema
    lag = f'target lags by {lag}' if used else f'average lags by {lag}'
    if not errors:
        return report.Section(
            number=f'error does not apply; {lag}', grade='none',
            verdict=f'{subject.name} has no step sizes to agree', **about,
        )  # fmt: skip
    mean = float(np.mean([e for curve in errors.values() for e in curve.values()]))
    # A teacher that is off by more than the error that it teaches is the fault itself.
    grade = _grade(max(mean, max(outputs) if used else 0), 0.1, 0.3)
    verdict = {
        'good': 'steps agree with their halves',
        'fair': 'steps differ somewhat from their halves',
        'poor': 'steps and their halves disagree'
        if mean >= 0.3
        else 'the teacher lags far behind',
    }[grade]
    if not used:
        verdict += f' ({subject.name} learns without a target average)'
    return report.Section(
        number=f'error {mean:.3f}; {lag}', verdict=verdict, grade=grade, **about
    )


def _consistency_errors(subject: Subject) -> dict[float, dict[float, float]]:
    """w -> {whole step: error} on points of the training's paths."""
    objective = subject.objective
    base = objective.base_steps
    noise, data, label = subject.some(2 * FEW_SAMPLES)
    low, high = subject.guidances()
    errors = {}
    for w in sorted({low, (low + high) / 2, high}):
        rng = np.random.default_rng(subject.seed)  # The same points for every w.
        errors[w] = {}
        for steps in 2 ** np.arange(1, time_grid.num_levels(base) + 1):
            start = diagnostics.aligned_times(rng, label.shape[0], int(steps), base)
            t, whole = objective.clip_step(
                jnp.asarray(start), jnp.full(start.shape, steps / base, jnp.float32)
            )
            x = interpolant.interpolate(noise, data, t)
            errors[w][float(steps / base)] = diagnostics.self_consistency_error(
                lambda *inputs: subject.velocity(subject.params, *inputs),
                x, t, whole / 2, jnp.full_like(t, w), label,
            )  # fmt: skip
    return errors


def _lags(subject: Subject, params, online) -> dict[str, float]:
    """Distances of an average from the online network."""
    lags = {'parameters': diagnostics.parameter_distance(params, online)}
    noise, data, label = subject.some(2 * FEW_SAMPLES)
    base = subject.objective.base_steps
    low, _ = subject.guidances()
    rng = np.random.default_rng(subject.seed)
    sizes = [base]
    if subject.objective.conditions_on_step:
        sizes = sorted({base, max(1, base // 8), 1}, reverse=True)
    for steps in sizes:
        start = diagnostics.aligned_times(rng, label.shape[0], steps, base)
        t, d = subject.objective.clip_step(
            jnp.asarray(start), jnp.full(start.shape, steps / base, jnp.float32)
        )
        x = interpolant.interpolate(noise, data, t)
        own, other = (
            np.asarray(subject.velocity(p, x, t, d, jnp.full_like(t, low), label))
            for p in (online, params)
        )
        name = 'outputs'
        if len(sizes) > 1:
            name += ', d = ' + ('1' if steps == base else f'1/{base // steps}')
        lags[name] = diagnostics.relative_rms(other - own, own)
    return lags


def diagnose_paths(subject: Subject) -> report.Section:
    """Section of fault 5."""
    crossings = _crossings(subject)
    of_class = crossings['as trained, same class']
    crossing = f'{100 * of_class:.2g} % of pairs (same class) better swapped'
    about = dict(
        fault='Curvy trajectories',
        question='Do samples travel straight from noise to data?',
        good='length 1, S = 0; 0 % of pairs better swapped (independent: 50 %)',
        text='A straight path can be walked in one step, a curved one cannot. Paths '
        'curve where training pairs of noise and image cross each other, so good pairs '
        '(optimal transport) make straight paths.',
    )
    if not subject.objective.deterministic:
        return report.Section(
            number=f'length does not apply; {crossing}',
            verdict=f'{subject.name} adds noise on the way, so there are no paths',
            grade='none', figure=report.trajectory_figure(None, None, crossings),
            caption=f'Pairs as trained: {subject.coupling}.', **about,
        )  # fmt: skip
    objective = subject.objective
    num = min(FEW_SAMPLES, len(subject.label))
    _, _, label = subject.some(num)
    low, _ = subject.guidances()
    base = objective.base_steps
    clipped = [
        objective.clip_step(t, d)
        for t, d in zip(
            *time_grid.times_and_sizes(time_grid.dyadic_schedule(base, base), base)
        )
    ]
    times, steps = np.asarray(clipped, np.float32).T
    path = jax.jit(
        lambda noise: diagnostics.trajectory(
            lambda *inputs: subject.velocity(subject.params, *inputs),
            noise, jnp.full(label.shape, low), label, times, steps,
        )
    )(_sample_noise(subject, num))  # fmt: skip
    ratios = diagnostics.path_length_ratio(path)
    curve = diagnostics.straightness(path, steps)
    grade = _grade(float(ratios.mean()) - 1, 0.05, 0.2)
    return report.Section(
        number=f'length {ratios.mean():.3f}, S = {curve:.3f}; {crossing}',
        verdict={
            'good': 'paths are nearly straight',
            'fair': 'paths are somewhat curved',
            'poor': 'paths are strongly curved',
        }[grade],
        grade=grade,
        figure=report.trajectory_figure(
            diagnostics.path_profile(path), ratios, crossings
        ),
        caption=f'Paths of {num} samples in {base} steps at w = {low:g}, in units of '
        'their own straight line. Two pairs are better swapped if exchanging their '
        f'partners shortens them. Pairs as trained: {subject.coupling}.',
        **about,
    )  # fmt: skip


def _crossings(subject: Subject) -> dict[str, float]:
    """Share of pairs better swapped, of the first pool; and of an independent one."""
    size = subject.pairs
    noise, data, label = (
        x[:size] for x in (subject.noise, subject.data, subject.label)
    )
    other = np.random.default_rng(subject.seed).permutation(size)
    crossings = {}
    for name, partner in (('as trained', noise), ('independent', noise[other])):
        crossings[f'{name}, any class'] = diagnostics.crossing_rate(partner, data)
        crossings[f'{name}, same class'] = diagnostics.crossing_rate(
            partner, data, labels=label
        )
    return crossings


def _grade(value: float, good: float, fair: float) -> str:
    """Our own limits; the source gives none."""
    return 'good' if value < good else 'fair' if value < fair else 'poor'


# Proposition 1 in closed form.


def closed_form_compounding(
    class_std: float = DATA_STD, *, scale: float = CLOSED_FORM_SCALE, base_steps=128
) -> dict[str, dict[int, diagnostics.EffectiveScale]]:
    """Effective scales of perfectly trained networks in a Gaussian flow.

    Args:
      class_std: of the data of a class; all data have `DATA_STD`. Where the two are
        the same the proposition is exact.
      scale: g.
      base_steps: 1 / the smallest step.

    Returns:
      name of the recursion -> {N: what was found}.
    """
    rng = np.random.default_rng(0)
    spread = math.sqrt(max(DATA_STD**2 - class_std**2, 0.01))
    means = spread * rng.normal(size=(NUM_CLASSES, *CLOSED_FORM_SHAPE))
    flow = gaussian_flow.GaussianFlow(
        means.astype(np.float32), class_std=class_std, data_std=DATA_STD
    )
    label = jnp.arange(CLOSED_FORM_SAMPLES, dtype=jnp.int32) % NUM_CLASSES
    data = flow.sample_data(jax.random.key(0), label)
    noise = jax.random.normal(jax.random.key(1), data.shape)
    field = jax.jit(lambda x, t, label: flow.velocity(x, t, jnp.zeros_like(t), label))

    def measure(guided):
        def jump(x, t, d):
            return diagnostics.shortcut_jump(
                field, x, t, label, null=NUM_CLASSES, base_steps=base_steps,
                steps=round(float(d[0]) * base_steps), scale=scale, guided=guided,
            )  # fmt: skip

        return diagnostics.compounding(
            jump, field, noise, data, label, null=NUM_CLASSES, base_steps=base_steps
        )

    names = {'SM, all levels': 'all', 'SM, finest': 'finest', 'iSM': 'velocity'}
    return {name: measure(guided) for name, guided in names.items()}


def compounding_table(columns: Mapping[str, Mapping[int, Any]], scale: float) -> str:
    """Text table of effective scales over N; '~' where none is clear."""
    sizes = sorted(next(iter(columns.values())))
    head = ['N', 'g ** log2 N', *columns]
    rows = [
        [str(n), f'{scale ** math.log2(n):.3f}']
        + [
            f'{"" if column[n].is_clear() else "~"}{column[n].scale:.3f}'
            for column in columns.values()
        ]
        for n in sizes
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        '  '.join(c.rjust(w) for c, w in zip(row, widths)) for row in [head, *rows]
    ]
    return '\n'.join(lines)


def run_compounding():
    """Does what `compounding` on the command line says."""
    scale = CLOSED_FORM_SCALE
    for share in (1.0, 0.9, 0.5):
        exact = ' (where the proposition is exact)' if share == 1 else ''
        print(f'\nclosed form, g = {scale}, class_std = {share:g} data_std{exact}')
        print(compounding_table(closed_form_compounding(share * DATA_STD), scale))
    if FLAGS.workdir:
        subject, step = load_subject(FLAGS.workdir, FLAGS.step, FEW_SAMPLES)
        low, high = subject.guidances()
        w = low if low == high else min(COMPOUNDING_GUIDANCE, high)
        if not w or not subject.objective.conditions_on_step:
            raise ValueError(
                f'{FLAGS.workdir} is of the method {subject.name!r}, which has no '
                'guidance or no steps of different sizes; give a run of one that has'
            )
        print(f'\n{FLAGS.workdir} ({subject.name}), step {step}, g = {1 + w:g}')
        print(compounding_table({'network': measure_compounding(subject, w)}, 1 + w))
    print('\n~ no scale below 64 explains half of the jump')


def diagnose(
    workdir,
    *,
    out=None,
    step: int | None = None,
    samples: int = 512,
    show: Callable[[str], Any] = print,
) -> list[report.Section]:
    """All five diagnoses of a run; writes the report.

    Args:
      workdir: folder of the run.
      out: the HTML file; `report.html` in the workdir by default.
      step: which checkpoint; the latest by default.
      samples: how many the spectra are made of.
      show: is told in words what was found.

    Raises:
      ValueError: no run, no such checkpoint, too few samples.
    """
    if samples < 16:
        raise ValueError(f'--samples {samples} must be at least 16, for a spectrum')
    subject, trained = load_subject(workdir, step, samples)
    sections = [
        diagnose_compounding(subject, closed_form_compounding()),
        diagnose_response(subject),
        diagnose_frequencies(subject, samples),
        diagnose_consistency(subject),
        diagnose_paths(subject),
    ]
    out = Path(out or Path(workdir) / 'report.html')
    page = report.page(
        f'Diagnosis of {Path(workdir).name}',
        f'{subject.name}, {trained:,} training steps, slow average; '
        f'{samples} samples; pairs: {subject.coupling}',
        sections,
        'The limits between good, fair and poor are ours and serve to compare runs. '
        'The faults are those of arXiv 2510.21250. Made by '
        f'python -m ism_jax.diagnose --workdir {workdir} --samples {samples}',
    )
    files.write_bytes(out, page.encode())
    for section in sections:
        show(f'{section.fault}: {section.number} ({section.verdict})')
    show(f'wrote {out}')
    return sections


def run_flags():
    """Does what the command line says."""
    if not FLAGS.workdir:
        raise ValueError('give the --workdir of a run, or the command compounding')
    diagnose(
        FLAGS.workdir, out=FLAGS.out, step=FLAGS.step, samples=FLAGS.samples
    )  # fmt: skip


def main(argv):
    if argv[1:2] == ['compounding']:
        command_line.main(run_compounding)(argv[:1] + argv[2:])
    else:
        command_line.main(run_flags)(argv)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('workdir', None, 'Folder of the run.')
    flags.DEFINE_string('out', None, 'The HTML file; report.html in the workdir.')
    flags.DEFINE_integer('step', None, 'Checkpoint; the latest if not given.')
    flags.DEFINE_integer('samples', 512, 'Of which spectra are made.')
    app.run(main)
