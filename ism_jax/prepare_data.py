r"""Encodes images into latents once, before training.

    python -m ism_jax.prepare_data --source tfds:imagenet2012 --image_size 256 \
        --autoencoder stabilityai/sd-vae-ft-mse --out /data/imagenet256
    python -m ism_jax.prepare_data --out /data/imagenet256 --verify
    python -m ism_jax.train --config configs/imagenet256_ism_xl2.py \
        --config.data.source=latents:/data/imagenet256

Images are cropped as in ADM (`data.image_crop.center_crop`). For each image and its
mirror image, the mean and the log-variance of the autoencoder's posterior are stored,
so that training draws a new posterior sample in each epoch. `ism_jax.data.latents`
describes the files.

One process uses all its devices. Several processes that write to one shared folder each
encode their share of the shards: the processes of a cluster (`--distributed`), or
independent ones (`--process_index`, `--process_count`). The same command resumes: it
keeps finished shards. An unreadable image stops it; `--on_corrupt=skip` skips the image
and lists it in the manifest.
"""

from collections.abc import Callable
import sys
from typing import Any

from absl import flags

from ism_jax.data import latent_preparation, latents, sources
from ism_jax.data.source import CorruptImageError
from ism_jax.interchange import autoencoder_weights
from ism_jax.runtime import command_line, distributed, paths


def prepare(
    source_name: str,
    autoencoder_name: str,
    out,
    *,
    image_size: int = 256,
    data_dir: str = '',
    split: str = 'train',
    compute_dtype: str = 'float32',
    batch_size: int = 64,
    **options,
) -> dict[str, Any] | None:
    """Encodes a source with an autoencoder.

    Args:
      source_name: see `sources.make_source`.
      autoencoder_name: folder, safetensors file or hub id.
      out: folder of the latents.
      image_size: side of the cropped images, in pixels.
      data_dir: folder of TFDS, or of the cache of `datasets`; '' for its default.
      split: split of a data set of TFDS or the hub.
      compute_dtype: dtype of the encoder's computation.
      batch_size: images encoded at once, on all devices.
      **options: options of `latent_preparation.prepare`.

    Returns:
      The manifest, or None while other processes have shards to write.

    Raises:
      ValueError: invalid settings.
      CorruptImageError: an image cannot be read.
    """
    if not source_name or not autoencoder_name:
        raise ValueError(
            'give --source and --autoencoder, such as --source folder:/data/train '
            '--autoencoder stabilityai/sd-vae-ft-mse'
        )
    source = sources.make_source(
        source_name, image_size=image_size, channels=3, data_dir=data_dir, split=split
    )
    autoencoder, params = autoencoder_weights.load(
        autoencoder_name, dtype=compute_dtype
    )
    about = {
        'autoencoder': autoencoder_name,
        'autoencoder_sha256': autoencoder_weights.digest(autoencoder_name),
        'scaling_factor': autoencoder.config.scaling_factor,
        'compute_dtype': compute_dtype,
        'image_size': image_size,
        'crop': 'centre, as in ADM',
        'latent_shape': list(autoencoder.latent_shape(image_size)),
    }
    encoder = latent_preparation.make_encoder(autoencoder.encode, params, batch_size)
    try:
        return latent_preparation.prepare(
            source, encoder, out, about=about, batch_size=batch_size, **options
        )
    except CorruptImageError as error:
        raise CorruptImageError(
            f'{error}; repair or remove it, or skip such images with '
            '--on_corrupt=skip. Finished shards are kept'
        ) from error


def verify(out, *, log: Callable[[str], Any] = print) -> bool:
    """Reads every byte of a folder; returns whether all files are intact."""
    problems = latent_preparation.verify(out, log)
    for line in problems:
        log(line)
    log(
        'remove these files and run the same command without --verify'
        if problems
        else 'all files are intact'
    )
    return not problems


def run_flags():
    """Runs the command."""
    if FLAGS.verify:
        out = paths.local_path(FLAGS.out, '--out')
        if not verify(out):
            sys.exit(1)
        return
    out = paths.from_user(FLAGS.out, '--out')
    distributed.start_by_flags(FLAGS)
    manifest = prepare(
        FLAGS.source,
        FLAGS.autoencoder,
        out,
        image_size=FLAGS.image_size,
        data_dir=FLAGS.data_dir,
        split=FLAGS.split,
        compute_dtype=FLAGS.compute_dtype,
        batch_size=FLAGS.batch_size,
        shards=FLAGS.shards,
        dtype=FLAGS.dtype,
        on_corrupt=FLAGS.on_corrupt,
        num_threads=FLAGS.num_threads,
        **distributed.share_by_flags(FLAGS),
    )
    if manifest:
        shape = tuple(manifest['latent_shape'])
        print(f'{manifest["count"]:,} latents {shape} in {FLAGS.out}')


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string(
        'source',
        '',
        "'tfds:NAME', 'folder:PATH', 'parquet:PATTERN', 'hf:NAME' or 'tar:PATTERN'.",
    )
    flags.DEFINE_string(
        'data_dir',
        '',
        "Folder of TFDS or of the cache of datasets; '' for its default.",
    )
    flags.DEFINE_string('split', 'train', 'Split of a data set of TFDS or the hub.')
    flags.DEFINE_integer('image_size', 256, 'Side of the cropped images.', 1)
    flags.DEFINE_string('autoencoder', '', 'Folder, safetensors file or hub id.')
    flags.DEFINE_string('out', None, 'Folder of the latents.', required=True)
    flags.DEFINE_enum('dtype', 'float16', latents.DTYPES, 'Dtype of the latents.')
    flags.DEFINE_enum(
        'compute_dtype', 'float32', ('float32', 'bfloat16'), 'Dtype of the encoder.'
    )
    flags.DEFINE_integer('shards', 128, 'Number of files; finished ones are kept.')
    flags.DEFINE_integer('batch_size', 64, 'Images encoded at once, on all devices.')
    flags.DEFINE_enum(
        'on_corrupt', 'error', ('error', 'skip'), 'What to do with unreadable images.'
    )
    flags.DEFINE_integer('num_threads', 8, 'Threads that read images.', 1)
    distributed.define_flags()
    distributed.define_share_flags('shards')
    flags.DEFINE_bool('verify', False, 'Only verify the files of --out.')
    command_line.run(run_flags, CorruptImageError)
