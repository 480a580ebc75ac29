"""Makes latents of images, once, for training to read.

    python -m ism_jax.prepare_data --source tfds:imagenet2012 --image_size 256 \\
        --autoencoder stabilityai/sd-vae-ft-mse --out /data/imagenet256
    python -m ism_jax.prepare_data --out /data/imagenet256 --verify
    python -m ism_jax.train --config configs/imagenet256_ism_xl2.py \\
        --config.data.source=latents:/data/imagenet256

Images are cropped as in ADM (`sources.center_crop`); of each and of its mirror image
the mean and the log-variance of the autoencoder's posterior are stored, so that
training samples the posterior afresh each time. See `ism_jax.data.latents` for the
files.

Uses all devices of this process. Of several, in one folder that all of them see, each
makes its share of the shards: the processes of a cluster (`--distributed`), or such
that do not know each other (`--process_index`, `--process_count`).
The same command again goes on where it was stopped: a shard that is finished is not
made again. Images that cannot be read stop it, or are left out and listed in the
manifest with `--on_corrupt=skip`.
"""

from collections.abc import Callable
import json
from pathlib import Path
import sys
import time
from typing import Any

from absl import app, flags
from array_record.python import array_record_module
import grain
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import tqdm

from ism_jax.data import latents, sources
from ism_jax.models import vae
from ism_jax.runtime import command_line, distributed, files, sharding

# Finished shards are described here, until and after the manifest is written.
PARTS = 'parts'


def shard_ranges(size: int, count: int) -> list[range]:
    """Which images each shard holds; as even as can be, in order.

    Raises:
      ValueError: more shards than images, or none.
    """
    if not 1 <= count <= size:
        raise ValueError(
            f'--shards {count} must be in 1 .. {size}, the number of images'
        )
    edges = [size * i // count for i in range(count + 1)]
    return [range(*edge) for edge in zip(edges[:-1], edges[1:])]


def make_encoder(encode: Callable, params, batch_size: int):
    """`encode` on all devices of this process, of images and their mirror images.

    Args:
      encode: (params, [B, H, W, C] in [-1, 1]) to mean and log-variance, both
        [B, h, w, c].
      params: of the encoder.
      batch_size: B; a smaller batch is filled up.

    Returns:
      A function from uint8 [b, H, W, C], b at most B, to (mean, log-variance), float32
      [b, 2, h, w, c] each.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    devices = jax.local_devices()
    if batch_size < 1 or batch_size % len(devices):
        raise ValueError(
            f'--batch_size {batch_size} must be a multiple of the {len(devices)} '
            'devices'
        )
    mesh = sharding.local_mesh()
    split = NamedSharding(mesh, P(('data', 'fsdp')))
    params = jax.device_put(params, sharding.replicated(mesh))

    @jax.jit
    def both(params, pixels):
        images = pixels.astype(jnp.float32) / 127.5 - 1
        pairs = [encode(params, x) for x in (images, images[:, :, ::-1])]
        return tuple(jnp.stack(parts, 1).astype(jnp.float32) for parts in zip(*pairs))

    def run(pixels):
        padding = [(0, batch_size - len(pixels))] + [(0, 0)] * 3
        out = both(params, jax.device_put(np.pad(pixels, padding), split))
        return tuple(np.asarray(part)[: len(pixels)] for part in out)

    return run


def prepare(
    source: sources.Source,
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
    show: Callable[[str], Any] = print,
) -> dict[str, Any] | None:
    """Writes the shards of this process that are not there yet.

    Args:
      source: of uint8 images.
      encoder: see `make_encoder`.
      out: folder.
      about: of the autoencoder and the crop, for the manifest; what is in it must be
        the same when the work goes on. `scaling_factor` must be in it.
      shards: how many files.
      batch_size: images encoded at once.
      dtype: one of `latents.DTYPES`.
      on_corrupt: 'error' or 'skip'.
      num_threads: that read images.
      process_index, process_count: makes the shards `process_index`, `process_index +
        process_count`, ...
      wait: the first process waits for what the others make.
      show: is told in words what is done.

    Returns:
      The manifest, or None where other processes have shards to make yet.

    Raises:
      ValueError: the folder holds other work, or a setting is out of range.
      sources.CorruptImageError: an image that cannot be read, by name.
    """
    if dtype not in latents.DTYPES:
        raise ValueError(f'--dtype {dtype!r} must be one of {latents.DTYPES}')
    if on_corrupt not in ('error', 'skip'):
        raise ValueError(f"--on_corrupt {on_corrupt!r} must be 'error' or 'skip'")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f'--process_index {process_index} must be in 0 .. {process_count - 1}'
        )
    out = Path(out).expanduser()
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
    missing = [i for i in range(shards) if _read_part(out, i, shards) is None]
    own = [i for i in missing if i % process_count == process_index]
    done = sum(len(ranges[i]) for i in range(shards) if i not in missing)
    if done:
        show(
            f'{shards - len(missing)} of {shards} shards are finished, {done:,} of '
            f'{len(source):,} images'
        )
    total = sum(len(ranges[i]) for i in own)
    started, images_done = time.time(), 0
    # On a terminal a bar; in a file a line for each shard.
    with tqdm.tqdm(total=total, unit='image', disable=None, smoothing=0.05) as bar:
        for index in own:
            part = _write_shard(
                source, encoder, out, index, shards, ranges[index],
                batch_size=batch_size, dtype=dtype, on_corrupt=on_corrupt,
                num_threads=num_threads, progress=bar.update,
            )  # fmt: skip
            for entry in part['skipped']:
                tqdm.tqdm.write(f'skipped: {entry["file"]}: {entry["reason"]}')
            images_done += len(ranges[index])
            if bar.disable:
                speed = images_done / (time.time() - started)
                show(
                    f'shard {index}: {images_done:,}/{total:,} images, {speed:.1f} '
                    f'images/s, {(total - images_done) / speed / 60:.1f} min left'
                )
    if wait and process_index:
        return None
    read = lambda: [_read_part(out, i, shards) for i in range(shards)]
    if wait:
        distributed.wait_until(lambda: None not in read())
    parts = read()
    absent = sum(part is None for part in parts)
    if absent:
        show(f'{absent} of {shards} shards are left for other processes')
        return None
    return _finish(out, settings, parts)


def _claim(out: Path, settings: dict) -> None:
    """Makes the folder this work's, or sees that it is.

    Raises:
      ValueError: it is another's, naming what differs.
    """
    path = out / 'settings.json'
    if not path.exists():
        if (out / 'manifest.json').exists():
            raise ValueError(f'--out {out} holds other latents; choose another folder')
        files.write_bytes(path, (json.dumps(settings, indent=1) + '\n').encode())
        return
    old = json.loads(path.read_text())
    new = json.loads(json.dumps(settings))
    differing = [
        f'{name}: {old.get(name)!r} -> {new.get(name)!r}'
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise ValueError(
            f'--out {out} holds latents of other settings ({"; ".join(differing)}); '
            'set them back or choose another folder'
        )


def _read_part(out: Path, index: int, count: int) -> dict | None:
    """What is known of a finished shard; None if it is not there whole."""
    path = out / PARTS / f'{index:05d}.json'
    shard = out / latents.shard_name(index, count)
    if not path.exists() or not shard.exists():
        return None
    part = json.loads(path.read_text())
    return part if shard.stat().st_size == part['bytes'] else None


def _write_shard(
    source, encoder, out, index, count, images, *, batch_size, dtype, on_corrupt,
    num_threads, progress,
) -> dict:  # fmt: skip
    """Writes a shard under another name, renames it, then describes it."""
    path = out / latents.shard_name(index, count)
    unfinished = path.with_name(f'.{path.name}.unfinished')
    labels, skipped, moments = [], [], latents.ChannelMoments()

    def read(position):
        number = images[int(position)]
        try:
            return number, source[number], ''
        except sources.CorruptImageError as error:
            return number, None, str(error.__cause__ or error)

    dataset = grain.MapDataset.range(len(images)).map(read)
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=2 * batch_size
    )
    # Records of one: each is read by itself, in the random order of training.
    writer = array_record_module.ArrayRecordWriter(str(unfinished), 'group_size:1')
    waiting = []

    def flush():
        if not waiting:
            return
        pixels = np.stack([record['image'] for record in waiting])
        for record, mean, log_variance in zip(waiting, *encoder(pixels)):
            label = int(record['label'])
            labels.append(label)
            moments.add(mean, log_variance)
            writer.write(latents.pack(latents.Record(label, mean, log_variance), dtype))
        progress(len(waiting))
        waiting.clear()

    try:
        for number, record, reason in dataset.to_iter_dataset(options):
            if record is None:
                entry = {'file': source.name_of(number), 'reason': reason}
                if on_corrupt == 'error':
                    raise sources.CorruptImageError(
                        f'{entry["file"]} cannot be read ({reason}); repair or remove '
                        'it, or leave such images out with --on_corrupt=skip. '
                        'Finished shards stay'
                    )
                skipped.append(entry)
                progress(1)
                continue
            waiting.append(record)
            if len(waiting) == batch_size:
                flush()
        flush()
    finally:
        writer.close()
    unfinished.replace(path)
    part = {
        'name': path.name,
        'count': len(labels),
        'bytes': path.stat().st_size,
        'sha256': latents.file_digest(path),
        'labels': labels,
        'skipped': skipped,
        'moments': moments.to_json(),
    }
    files.write_bytes(out / PARTS / f'{index:05d}.json', json.dumps(part).encode())
    return part


def _finish(out: Path, settings: dict, parts: list[dict]) -> dict:
    """Writes the manifest."""
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


def verify(out, show: Callable[[str], Any] = print) -> list[str]:
    """Reads every byte again.

    Returns:
      What is wrong, a line each; nothing if all is well.

    Raises:
      ValueError: there is no manifest.
    """
    out = Path(out).expanduser()
    manifest = latents.read_manifest(out)
    shape, problems, position = tuple(manifest['latent_shape']), [], 0
    labels_path = out / 'labels.npy'
    labels = None
    if not labels_path.is_file() or (
        latents.file_digest(labels_path) != manifest['labels_sha256']
    ):
        problems.append(f'{labels_path}: not the file of the manifest')
    else:
        labels = np.load(labels_path, allow_pickle=False)
    for shard in tqdm.tqdm(manifest['shards'], unit='shard', disable=None):
        path = out / shard['name']
        expected = slice(position, position + shard['count'])
        position += shard['count']
        if not path.is_file():
            problems.append(f'{path}: missing')
        elif latents.file_digest(path) != shard['sha256']:
            problems.append(f'{path}: not the bytes that were written')
        else:
            found = _labels_of(path, shape, manifest['dtype'])
            if labels is not None and found != labels[expected].tolist():
                problems.append(f'{path}: labels or number of records differ')
    show(
        f'{len(manifest["shards"])} shards, {manifest["count"]:,} latents '
        f'{shape} in {manifest["dtype"]}, {len(manifest["skipped"])} images left out'
    )
    return problems


def _labels_of(path: Path, shape, dtype: str) -> list[int]:
    """Labels of a shard's records, in order; -1 for one that is not finite."""
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


def run_flags():
    """Does what the command line says."""
    if FLAGS.verify:
        problems = verify(FLAGS.out)
        for line in problems:
            print(line)
        if problems:
            print('remove these files and run the same command without --verify again')
            sys.exit(1)
        print('all is as it was written')
        return
    distributed.start_by_flags(FLAGS)
    if not FLAGS.source or not FLAGS.autoencoder:
        raise ValueError(
            '--source and --autoencoder say what to prepare with what, such as '
            '--source folder:/data/train --autoencoder stabilityai/sd-vae-ft-mse'
        )
    source = sources.make_source(
        FLAGS.source, image_size=FLAGS.image_size, channels=3,
        data_dir=FLAGS.data_dir, split=FLAGS.split,
    )  # fmt: skip
    autoencoder, params = vae.load(FLAGS.autoencoder, dtype=FLAGS.compute_dtype)
    shape = autoencoder.latent_shape(FLAGS.image_size)
    about = {
        'autoencoder': FLAGS.autoencoder,
        'autoencoder_sha256': vae.digest(FLAGS.autoencoder),
        'scaling_factor': autoencoder.config.scaling_factor,
        'compute_dtype': FLAGS.compute_dtype,
        'image_size': FLAGS.image_size,
        'crop': 'centre, as in ADM',
        'latent_shape': list(shape),
    }
    encoder = make_encoder(autoencoder.encode, params, FLAGS.batch_size)
    manifest = prepare(
        source, encoder, FLAGS.out, about=about, shards=FLAGS.shards,
        batch_size=FLAGS.batch_size, dtype=FLAGS.dtype, on_corrupt=FLAGS.on_corrupt,
        num_threads=FLAGS.num_threads, **distributed.share_by_flags(FLAGS),
    )  # fmt: skip
    if manifest:
        print(f'{manifest["count"]:,} latents {shape} in {FLAGS.out}')


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('source', '', "'tfds:NAME' or 'folder:PATH'.")
    flags.DEFINE_string('data_dir', '', "TFDS's folder; '' for its default.")
    flags.DEFINE_string('split', 'train', 'Of a TFDS data set.')
    flags.DEFINE_integer('image_size', 256, 'Side of the cropped images.')
    flags.DEFINE_string('autoencoder', '', 'Folder, safetensors file or hub id.')
    flags.DEFINE_string('out', None, 'Folder of the latents.', required=True)
    flags.DEFINE_enum('dtype', 'float16', latents.DTYPES, 'Of the files.')
    flags.DEFINE_enum(
        'compute_dtype', 'float32', ('float32', 'bfloat16'), 'Of the encoder.'
    )
    flags.DEFINE_integer('shards', 128, 'Files; one that is finished stays so.')
    flags.DEFINE_integer('batch_size', 64, 'Images encoded at once, on all devices.')
    flags.DEFINE_enum(
        'on_corrupt', 'error', ('error', 'skip'), 'At images that cannot be read.'
    )
    flags.DEFINE_integer('num_threads', 8, 'Threads that read images.')
    distributed.define_flags()
    distributed.define_share_flags('shards')
    flags.DEFINE_bool('verify', False, 'Only read every byte of --out again.')
    app.run(command_line.main(run_flags, sources.CorruptImageError))
