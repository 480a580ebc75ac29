"""Latents that `ism_jax.prepare_data` prepared, sampled from their posteriors."""

from collections.abc import Sequence
import hashlib

import numpy as np

from ism_jax.data import latents, shard_cache, source
from ism_jax.runtime import checksums, paths


class LatentSource(source.Source):
    """A source of latents; `source[i]` is a `latents.Record`.

    Args:
      path: the finished folder, local or in a bucket.
      shape: (h, w, c), the expected shape of a latent.
      mean: per channel, subtracted from the latents; () for 0.
      std: per channel, divides the latents; () to multiply them by the autoencoder's
        `scaling_factor` instead.
      cache_dir: local folder for a copy of latents in a bucket.

    Attributes:
      manifest: the folder's manifest.
      labels: [N] int32, of all records.

    Raises:
      ValueError: the folder is incomplete, its files do not match the manifest, or the
        latents have another shape.
    """

    def __init__(
        self,
        path: str,
        *,
        shape: tuple[int, int, int],
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        cache_dir: str = '',
    ):
        from array_record.python import array_record_data_source

        folder = paths.from_user(path, 'latents')
        if paths.is_bucket(folder):
            folder = shard_cache.local_copy(folder, cache_dir)
        self.path = folder
        self.manifest = latents.read_manifest(self.path)
        self.image_shape = tuple(self.manifest['latent_shape'])
        if self.image_shape != shape:
            height, width, channels = self.image_shape
            raise ValueError(
                f'the latents in {self.path} are {height}x{width} with {channels} '
                f'channels, not {shape[0]}x{shape[1]} with {shape[2]}; set '
                f'image_size = {height} and channels = {channels}'
            )
        self.class_names = tuple(self.manifest['class_names'])
        scale = self.manifest['scaling_factor']
        self._mean = np.asarray(mean or 0.0, np.float32)
        self._scale = 1 / np.asarray(std, np.float32) if std else np.float32(scale)
        self.skipped = source.SkippedImages()
        labels = self.path / 'labels.npy'
        sizes = {
            self.path / shard['name']: shard['bytes']
            for shard in self.manifest['shards']
        }
        # The shards are too large to hash; `prepare_data --verify` hashes them.
        changed = [
            path
            for path, size in sizes.items()
            if not path.is_file() or path.stat().st_size != size
        ]
        if checksums.sha256(labels) != self.manifest['labels_sha256']:
            changed.append(labels)
        if changed:
            raise ValueError(
                f'{changed[0]} is missing or is not the file that the manifest '
                'describes; remove it and manifest.json and run ism_jax.prepare_data '
                'again'
            )
        self.labels = np.load(labels, allow_pickle=False)
        self._records = array_record_data_source.ArrayRecordDataSource(
            [str(path) for path in sizes]
        )

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index) -> latents.Record:
        data = self._records[int(index)]
        return latents.unpack(data, self.image_shape, self.manifest['dtype'])

    def __repr__(self):
        digest = hashlib.sha256(
            ''.join(shard['sha256'] for shard in self.manifest['shards']).encode()
        )
        return (
            f'LatentSource({len(self)} latents {self.image_shape} of '
            f'{self.manifest["source"]}, sha256 {digest.hexdigest()[:12]})'
        )

    def draw(self, index, *, flip, random):
        record = self[index]
        latent = self.sample_posterior(record, flip=flip, random=random())
        return latent, np.int32(record.label)

    def mean_example(self, index):
        return (self[index].mean[0] - self._mean) * self._scale

    def sample_posterior(
        self, record: latents.Record, *, flip: bool, random: np.random.Generator
    ) -> np.ndarray:
        """A sample of a record's posterior, normalised for training.

            x = s (mean + exp(log_variance / 2) epsilon - m)

        with m = 0 and s = `scaling_factor`, or the source's `mean` and 1 / `std`.

        `flip` selects the posterior of the mirrored image; `random` generates epsilon.
        The result is [h, w, c] float32.
        """
        noise = random.standard_normal(self.image_shape, np.float32)
        deviation = np.exp(0.5 * record.log_variance[int(flip)])
        latent = record.mean[int(flip)] + deviation * noise
        return (latent - self._mean) * self._scale
