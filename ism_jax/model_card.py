"""The model card of a run: the README.md of its repository on the Hugging Face hub."""

import json
from pathlib import Path
import re
import sys

import jax
import numpy as np

from ism_jax import generator, trained_network
from ism_jax.evaluation import score_table
from ism_jax.sampling import image_grid

CARD, PICTURE = 'README.md', 'samples.png'
MAX_PICTURE_SIDE = 2048  # Pixels.
NUM_PICTURE_LABELS = 8
MAX_PICTURE_STEPS = 8


def write(
    folder,
    run: trained_network.TrainedNetwork,
    *,
    workdir,
    repo: str,
    license: str | None = None,
) -> None:
    """Writes the card, and a picture of samples unless the network makes latents.

    Args:
      folder: folder to write to.
      run: the network.
      workdir: folder of the run, for its scores.
      repo: id on the hub.
      license: identifier of the hub, such as 'mit'; None to state none.
    """
    folder, model = Path(folder), generator.Generator(run)
    header = {
        'license': license,
        'library_name': 'ism_jax',
        'pipeline_tag': 'unconditional-image-generation',
        'tags': f'[jax, flow-matching, few-step-generation, {_method_name(run)}]',
    }
    sections = [
        f'# {repo.partition("/")[2]}',
        _summary(run),
        *([_draw(folder, run, model)] if model.image_shape[2] in (1, 3) else []),
        _usage(model, repo),
        _training(run),
        _scores(Path(workdir), run),
    ]
    lines = [f'{name}: {value}' for name, value in header.items() if value]
    text = '\n'.join(['---', *lines, '---', '', '\n\n'.join(filter(None, sections))])
    (folder / CARD).write_text(text + '\n')


def _method_name(run) -> str:
    return run.config.objective.name


def _summary(run) -> str:
    """The method with its paper, which its module's first line names."""
    module = sys.modules[type(run.experiment().objective).__module__]
    title = module.__doc__.splitlines()[0].rstrip('.')
    link = r'[arXiv \1](https://arxiv.org/abs/\1)'
    title = re.sub(r'arXiv (\d{4}\.\d{5})', link, title)
    return (
        f'A network that generates images of {len(run.class_names)} classes in one or '
        f'a few steps. Method: {title}, trained with `ism_jax`.'
    )


def _draw(folder, run, model) -> str:
    low, high = model.guidance_range
    limit = min(MAX_PICTURE_STEPS, model.base_steps)
    steps = [n for n in run.config.sample.steps if n <= limit] or [limit]
    guidance = [w for w in run.config.sample.guidance if low <= w <= high] or [low]
    labels = [i % len(run.class_names) for i in range(NUM_PICTURE_LABELS)]
    cells = {
        (n, w): model.sample(labels, steps=n, guidance=w)
        for n in steps
        for w in guidance
    }
    side = model.image_shape[0]
    width = len(guidance) * 4 * side
    scale = min(image_grid.readable_scale(side), max(1, MAX_PICTURE_SIDE // width))
    picture = image_grid.steps_by_guidance_figure(
        cells, steps, guidance, columns=4, scale=scale
    )
    image_grid.write_png(folder / PICTURE, picture, {'trained_steps': run.step})
    return (
        f'![Samples: steps downwards, guidance scale to the right]({PICTURE})\n\n'
        'Every cell starts from the same noise. The samples are not selected.'
    )


def _usage(model, repo) -> str:
    low, high = model.guidance_range
    labels = list(range(min(3, len(model.class_names))))
    steps, w = min(4, model.base_steps), min(max(1.5, low), high)
    return (
        '## Use\n\n```python\nimport ism_jax\n\n'
        f"model = ism_jax.load('{repo}')\n"
        f'images = model.sample(labels={labels}, steps={steps}, guidance={w:g})\n'
        '```\n\n'
        f'The images are uint8 [N, H, W, C]. Steps: 1 to {model.base_steps}. '
        + (
            f'Guidance scale w: {low:g} to {high:g}. '
            if low < high
            else f'Training fixed the guidance scale at w = {low:g}. '
        )
        + 'Labels: indices or names of the classes, or `None` for the null label.'
    )


def _training(run) -> str:
    config = run.config
    kind, _, name = config.data.source.partition(':')
    # A path is the author's own.
    source = f'{kind}:{Path(name).name}' if name else kind
    height, width, channels = run.image_shape
    kind = 'latents' if config.data.autoencoder or channels > 3 else 'images'
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    batch = config.train.batch_size
    rows = {
        'data': f'`{source}`, {kind} of {height}x{width}x{channels}' if source else '',
        'classes': f'{len(run.class_names)}',
        'network': f'`{config.model.backbone}`, {parameters / 1e6:.1f} million '
        'parameters',
        'training': f'{run.step:,} steps of {batch} images ({run.step * batch:,})'
        if run.step
        else '',
        'weights': f'EMA with decay {config.ema.infer_decay:g}' if run.step else '',
    }
    lines = [f'| {name} | {text} |' for name, text in rows.items() if text]
    return '\n'.join(
        [
            '## Training\n\n| | |\n|---|---|',
            *lines,
            '\n`config.json` has every setting.',
        ]
    )


def _scores(workdir: Path, run) -> str:
    """The scores of this checkpoint, with what they depend on; '' if there are none."""
    parts = []
    metrics = workdir / 'evaluation' / 'records.json'
    if metrics.exists():
        records = json.loads(metrics.read_text())
        records = [r for r in records if r.get('trained_steps') == run.step]
        # A table is of one set of metrics and labels.
        protocols = {}
        for record in records:
            same = [record[name] for name in ('judges', 'labels', 'seed')]
            protocols.setdefault(json.dumps(same, sort_keys=True), []).append(record)
        parts += [score_table.metrics_table(same) for same in protocols.values()]
    classifier = workdir / 'scores.json'
    if classifier.exists():
        records = json.loads(classifier.read_text())
        records = [r for r in records if r['trained_steps'] == run.step]
        if records:
            parts.append(_classifier_scores(records, workdir))
    return '\n\n'.join(['## Scores', *parts]) if parts else ''


def _classifier_scores(records, workdir) -> str:
    """Frechet distances and accuracies, a row per steps and a column per guidance."""
    counts = sorted({record['samples'] for record in records})
    intervals = sorted({tuple(r['interval']) for r in records if r.get('interval')})
    settings = {
        (r['samples'], tuple(r.get('interval') or ()), r['steps'], r['guidance']): r
        for r in records
    }
    tables = []
    for count in counts:
        for interval in ((), *intervals):
            table = {
                k[2:]: r for k, r in settings.items() if k[:2] == (count, interval)
            }
            if table:
                tables.append(_table(table, count, interval))
    keys = ', '.join(sorted(p.stem for p in workdir.glob('classifier-*.npz')))
    return '\n\n'.join(
        [
            *tables,
            'Frechet distance (lower is better) between the features of samples and '
            'of real training images, by a small classifier that was trained on these '
            'images, and in brackets the share of samples that it assigns to their '
            'label. This is not the FID of Inception: compare it only with scores by '
            f'the same classifier{f" (`{keys}`)" if keys else ""} and of as many '
            'samples.',
        ]
    )


def _table(table, count, interval) -> str:
    steps = sorted({setting[0] for setting in table})
    guidance = sorted({setting[1] for setting in table})
    rows = [['steps', *(f'w = {w:g}' for w in guidance)], ['---'] * (len(guidance) + 1)]
    for number in steps:
        found = [table.get((number, w)) for w in guidance]
        rows.append([str(number), *map(_cell, found)])
    title = f'{count:,} samples' + (
        f', guidance in the interval {interval[0]:g} .. {interval[1]:g}'
        if interval
        else ''
    )
    lines = (f'| {" | ".join(row)} |' for row in rows)
    return '\n'.join([f'{title}:\n', *lines])


def _cell(record) -> str:
    if record is None:
        return ''
    fd = np.nan if record['fd'] is None else record['fd']
    return f'{fd:.3g} ({record["accuracy"]:.0%})'
