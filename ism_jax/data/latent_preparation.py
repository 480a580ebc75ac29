"""Encodes the images of a source into the shards of a latent folder, and verifies it.

A finished shard is described by a JSON file in the folder's `parts`, so preparation
resumes at the first shard that is missing, and several processes can share the shards.
"""

from collections.abc import Callable
import functools
import json
from pathlib import Path
import time
from typing import Any

from array_record.python import array_record_module
import grain
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import tqdm

from ism_jax.data import latents
from ism_jax.data.source import CorruptImageError, Source
from ism_jax.runtime import checksums, distributed, files, paths, sharding

PARTS = 'parts'


def shard_ranges(size: int, count: int) -> list[range]:
    """The images of each shard: consecutive ranges of nearly equal length.

    Raises:
      ValueError: more shards than images, or none.
    """
    if not 1 <= count <= size:
        raise ValueError(
            f'--shards {count} must be in 1 .. {size}, the number of images'
        )
    edges = [size * i // count for i in range(count + 1)]
    return [range(*edge) for edge in zip(edges[:-1], edges[1:], strict=True)]


def make_encoder(encode: Callable, params, batch_size: int):
    """A function that encodes images and their mirror images on all local devices.

    Args:
      encode: (params, [B, H, W, C] in [-1, 1]) to mean and log-variance, both
        [B, h, w, c].
      params: parameters of the encoder.
      batch_size: B; a smaller batch is padded.

    Returns:
      A function from uint8 [b, H, W, C], b at most B, to (mean, log-variance), float32
      [b, 2, h, w, c] each.

    Raises:
      ValueError: the number of devices does not divide the batch.
    """
    devices = jax.local_devices()
    if batch_size < 1 or batch_size % len(devices):
        raise ValueError(
            f'--batch_size {batch_size} must be a multiple of the {len(devices)} '
            'devices'
        )
    mesh = sharding.local_mesh()
    split = NamedSharding(mesh, sharding.BATCH)
    params = jax.device_put(params, sharding.replicated(mesh))

    @jax.jit
    def both(params, pixels):
        images = pixels.astype(jnp.float32) / 127.5 - 1
        pairs = [encode(params, x) for x in (images, images[:, :, ::-1])]
        return tuple(
            jnp.stack(parts, 1).astype(jnp.float32)
            for parts in zip(*pairs, strict=True)
        )

    def run(pixels):
        padding = [(0, batch_size - len(pixels))] + [(0, 0)] * 3
        out = both(params, jax.device_put(np.pad(pixels, padding), split))
        return tuple(np.asarray(part)[: len(pixels)] for part in out)

    return run


def prepare(
    source: Source,
    encoder: Callable,
    out,
    *,
    about: dict[str, Any],
    shards: int,
    batch_size: int,
    dtype: str = 'float16',
    on_corrupt: str = 'error',
    num_threads: int = 8,
    process_index: int = 0,
    process_count: int = 1,
    wait: bool = False,
    log: Callable[[str], Any] = print,
) -> dict[str, Any] | None:
    """Writes the missing shards of this process, and the manifest after the last.

    Args:
      source: source of uint8 images.
      encoder: see `make_encoder`.
      out: the folder.
      about: description of the autoencoder and the crop, for the manifest. It includes
        `scaling_factor` and must not change between runs.
      shards: number of files.
      batch_size: images encoded at once.
      dtype: one of `latents.DTYPES`.
      on_corrupt: 'error' stops at an unreadable image, 'skip' leaves it out and lists
        it in the manifest.
      num_threads: threads that read images.
      process_index: this process writes the shards `process_index`, `process_index +
        process_count`, ...
      process_count: number of processes that share the shards.
      wait: process 0 waits for the shards of the others.
      log: called with each line of progress.

    Returns:
      The manifest, or None while other processes have shards to write.

    Raises:
      ValueError: the folder holds latents with other settings.
      CorruptImageError: an image cannot be read.
    """
    out = paths.to_path(out)
    ranges = shard_ranges(len(source), shards)
    settings = about | {
        'source': repr(source),
        'images': len(source),
        'class_names': list(source.class_names),
        'dtype': dtype,
        'on_corrupt': on_corrupt,
        'num_shards': shards,
    }
    _claim(out, settings)
    missing = _missing_shards(out, ranges, log)
    own = {i: ranges[i] for i in missing if i % process_count == process_index}
    write = functools.partial(
        _write_shard,
        source,
        encoder,
        batch_size=batch_size,
        dtype=dtype,
        on_corrupt=on_corrupt,
        num_threads=num_threads,
    )
    _write_shards(write, out, own, shards, log)
    if wait and process_index:
        return None
    if wait:
        distributed.wait_until(lambda: None not in _read_parts(out, shards))
    parts = _read_parts(out, shards)
    if None in parts:
        log(f'{parts.count(None)} of {shards} shards are left for other processes')
        return None
    return _finish(out, settings, parts)


def _claim(out: Path, settings: dict) -> None:
    """Writes the settings into a new folder, or compares them with an old one's."""
    path = out / 'settings.json'
    new = json.loads(json.dumps(settings))
    if not path.exists() and not (out / 'manifest.json').exists():
        files.write_json(path, settings)
        return
    old = json.loads(paths.read_bytes(path)) if path.exists() else {}
    differing = [
        f'{name}: {old.get(name)!r} -> {new.get(name)!r}'
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise ValueError(
            f'--out {out} holds latents with other settings ({"; ".join(differing)}); '
            'restore them or choose another folder'
        )


def _read_parts(out: Path, count: int) -> list[dict | None]:
    """The descriptions of the shards; None for one that is unfinished or damaged."""

    def read(index):
        path = out / PARTS / f'{index:05d}.json'
        shard = out / latents.shard_name(index, count)
        if not path.exists() or not shard.exists():
            return None
        part = json.loads(paths.read_bytes(path))
        return part if paths.size(shard) == part['bytes'] else None

    return [read(index) for index in range(count)]


def _missing_shards(out: Path, ranges: list[range], log: Callable) -> list[int]:
    """Indices of the unfinished shards; logs how many are finished."""
    count, images = len(ranges), sum(map(len, ranges))
    parts = _read_parts(out, count)
    missing = [index for index, part in enumerate(parts) if part is None]
    if len(missing) < count:
        done = images - sum(len(ranges[index]) for index in missing)
        log(
            f'{count - len(missing)} of {count} shards are finished, {done:,} of '
            f'{images:,} images'
        )
    return missing


def _write_shards(
    write: Callable, out: Path, ranges: dict[int, range], count: int, log: Callable
) -> None:
    """Writes the shards of `ranges`, logging skipped images and progress."""
    total = sum(map(len, ranges.values()))
    started, done = time.time(), 0
    # A terminal shows a bar, a log file one line per shard.
    with tqdm.tqdm(total=total, unit='image', disable=None, smoothing=0.05) as bar:
        for index, images in ranges.items():
            path = out / latents.shard_name(index, count)
            part = write(path, images, progress=bar.update)
            described = json.dumps(part).encode()
            files.write_bytes(out / PARTS / f'{index:05d}.json', described)
            for entry in part['skipped']:
                tqdm.tqdm.write(f'skipped: {entry["file"]}: {entry["reason"]}')
            done += len(images)
            if bar.disable:
                speed = done / (time.time() - started)
                log(
                    f'shard {index}: {done:,}/{total:,} images, {speed:.1f} images/s, '
                    f'{(total - done) / speed / 60:.1f} min left'
                )


def _write_shard(
    source,
    encoder,
    path: Path,
    images: range,
    *,
    batch_size,
    dtype,
    on_corrupt,
    num_threads,
    progress,
) -> dict:
    """Writes a shard, completely or not at all; returns its description."""
    labels, skipped, moments = [], [], latents.ChannelMoments()

    def read(position):
        number = images[int(position)]
        try:
            return number, source[number]
        except CorruptImageError as error:
            return number, error

    def write(records):
        pixels = np.stack([record['image'] for record in records])
        for record, *posterior in zip(records, *encoder(pixels), strict=True):
            label = int(record['label'])
            labels.append(label)
            moments.add(*posterior)
            writer.write(latents.pack(latents.Record(label, *posterior), dtype))
        progress(len(records))

    dataset = grain.MapDataset.range(len(images)).map(read)
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=2 * batch_size
    )
    waiting = []
    with files.replacing(path) as unfinished:
        # Groups of one record, as training reads single records in random order.
        writer = array_record_module.ArrayRecordWriter(str(unfinished), 'group_size:1')
        try:
            for number, record in dataset.to_iter_dataset(options):
                if isinstance(record, CorruptImageError):
                    if on_corrupt == 'error':
                        raise record
                    reason = str(record.__cause__ or record)
                    skipped.append({'file': source.name_of(number), 'reason': reason})
                    progress(1)
                    continue
                waiting.append(record)
                if len(waiting) == batch_size:
                    write(waiting)
                    waiting = []
            if waiting:
                write(waiting)
        finally:
            writer.close()
        about = {
            'name': path.name,
            'count': len(labels),
            'bytes': unfinished.stat().st_size,
            'sha256': checksums.sha256(unfinished),
        }
    return about | {'labels': labels, 'skipped': skipped, 'moments': moments.to_json()}


def _finish(out: Path, settings: dict, parts: list[dict]) -> dict:
    """Writes and returns the manifest."""
    labels = np.concatenate([np.asarray(part['labels'], np.int32) for part in parts])
    if not len(labels):
        raise ValueError(f'none of the images could be read; see {out / PARTS}')
    per_class = np.bincount(labels, minlength=len(settings['class_names']))
    manifest = settings | {
        'count': len(labels),
        'count_per_class': per_class.tolist(),
        **latents.ChannelMoments.merged(p['moments'] for p in parts).statistics(),
        'skipped': [entry for part in parts for entry in part['skipped']],
        'shards': [
            {name: part[name] for name in ('name', 'count', 'bytes', 'sha256')}
            for part in parts
        ],
    }
    latents.write_manifest(out, manifest, labels)
    return manifest


def verify(out, log: Callable[[str], Any] = print) -> list[str]:
    """The damaged or missing files of a folder, found by reading every byte.

    Args:
      out: the folder.
      log: called with a summary of the folder.

    Returns:
      One line per problem; [] for none.

    Raises:
      ValueError: there is no manifest.
    """
    out = paths.local_path(out, '--out')
    manifest = latents.read_manifest(out)
    shape, problems, position = tuple(manifest['latent_shape']), [], 0
    labels_path = out / 'labels.npy'
    labels = None
    if not labels_path.is_file() or (
        checksums.sha256(labels_path) != manifest['labels_sha256']
    ):
        problems.append(f'{labels_path}: not the file that the manifest describes')
    else:
        labels = np.load(labels_path, allow_pickle=False)
    for shard in tqdm.tqdm(manifest['shards'], unit='shard', disable=None):
        path = out / shard['name']
        expected = slice(position, position + shard['count'])
        position += shard['count']
        if not path.is_file():
            problems.append(f'{path}: missing')
        elif checksums.sha256(path) != shard['sha256']:
            problems.append(f'{path}: not the bytes that were written')
        else:
            found = _labels_of(path, shape, manifest['dtype'])
            if labels is not None and found != labels[expected].tolist():
                problems.append(f'{path}: labels or number of records differ')
    log(
        f'{len(manifest["shards"])} shards, {manifest["count"]:,} latents '
        f'{shape} in {manifest["dtype"]}, {len(manifest["skipped"])} images skipped'
    )
    return problems


def _labels_of(path: Path, shape, dtype: str) -> list[int]:
    """Labels of a shard's records, in order; -1 for a record that is not finite."""
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        records = [latents.unpack(data, shape, dtype) for data in reader.read_all()]
    finally:
        reader.close()
    return [
        record.label
        if np.isfinite(record.mean).all() and np.isfinite(record.log_variance).all()
        else -1
        for record in records
    ]
