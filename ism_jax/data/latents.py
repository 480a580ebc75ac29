"""The files of prepared latents: records, channel statistics and the manifest.

A folder holds ArrayRecord shards, `manifest.json`, which describes them, and
`labels.npy`, the labels of all records in order. A record has no header, only

    label            int32
    mean             [2, h, w, c]  of the autoencoder's posterior
    log_variance     [2, h, w, c]

in the manifest's `dtype`, little-endian. Index 0 of the first axis is the image, index
1 its mirror image: the autoencoder is not symmetric, so mirroring a latent does not
give the latent of the mirror image. Means and log-variances are not scaled; the scaling
factor (0.18215 for Stable Diffusion's autoencoder) is applied when they are read.
"""

from collections.abc import Iterable
import io
import json
from typing import Any, NamedTuple

import numpy as np

from ism_jax.runtime import checksums, files, paths

MANIFEST, LABELS = 'manifest.json', 'labels.npy'
FORMAT = 'ism_jax latents'
VERSION = 1
DTYPES = ('float16', 'float32')
_LABEL = np.dtype('<i4')


class Record(NamedTuple):
    """The posteriors of one image.

    Attributes:
      label: its class.
      mean: [2, h, w, c], of the image and of its mirror image.
      log_variance: [2, h, w, c], likewise.
    """

    label: int
    mean: np.ndarray
    log_variance: np.ndarray


class ChannelMoments:
    """Mean and standard deviation of latents per channel, over images and pixels.

    The moments are those of posterior samples. Sums are float64.
    """

    def __init__(self):
        self._count, self._sum, self._squares = 0, np.zeros(1), np.zeros(1)

    def add(self, mean: np.ndarray, log_variance: np.ndarray) -> None:
        """Adds posteriors, [..., c] each."""
        channels = mean.shape[-1]
        mean = mean.reshape(-1, channels).astype(np.float64)
        variance = np.exp(log_variance.reshape(-1, channels).astype(np.float64))
        self._count += len(mean)
        self._sum = self._sum + mean.sum(0)
        self._squares = self._squares + (np.square(mean) + variance).sum(0)

    def to_json(self) -> list:
        return [self._count, self._sum.tolist(), self._squares.tolist()]

    @classmethod
    def merged(cls, parts: Iterable[list]) -> 'ChannelMoments':
        """The moments of all latents, from the `to_json` of each part."""
        out = cls()
        for count, total, squares in parts:
            out._count += count
            out._sum = out._sum + np.asarray(total)
            out._squares = out._squares + np.asarray(squares)
        return out

    def statistics(self) -> dict[str, list[float]]:
        """`channel_mean` and `channel_std`, as `LatentSource` takes them."""
        mean = self._sum / self._count
        std = np.sqrt(self._squares / self._count - np.square(mean))
        return {'channel_mean': mean.tolist(), 'channel_std': std.tolist()}


def pack(record: Record, dtype: str) -> bytes:
    """The bytes of a record.

    Raises:
      ValueError: a value is not finite in that dtype.
    """
    arrays = [np.asarray(a, np.float32) for a in (record.mean, record.log_variance)]
    with np.errstate(over='ignore'):  # Reported below.
        stored = [a.astype(np.dtype(dtype).newbyteorder('<')) for a in arrays]
    for name, array in zip(('mean', 'log_variance'), stored, strict=True):
        if not np.isfinite(array).all():
            raise ValueError(
                f'a {name} of the autoencoder is not finite in {dtype}; check the '
                'image and the weights, or prepare with --dtype float32'
            )
    label = np.array(record.label, _LABEL)
    return b''.join(part.tobytes() for part in (label, *stored))


def unpack(data: bytes, shape: tuple[int, int, int], dtype: str) -> Record:
    """Inverse of `pack`, as float32, for latents of shape [h, w, c].

    Raises:
      ValueError: the length is not that of a record of this shape and dtype.
    """
    kind = np.dtype(dtype).newbyteorder('<')
    label = np.frombuffer(data, _LABEL, 1)[0]
    values = np.frombuffer(data, kind, offset=_LABEL.itemsize).astype(np.float32)
    mean, log_variance = values.reshape(2, 2, *shape)
    return Record(int(label), mean, log_variance)


def shard_name(index: int, count: int) -> str:
    """The file name of shard `index` of `count`."""
    return f'latents-{index:05d}-of-{count:05d}.array_record'


def write_manifest(folder, manifest: dict[str, Any], labels: np.ndarray) -> None:
    """Writes `labels.npy` and then `manifest.json`, which marks a finished folder."""
    path = paths.to_path(folder) / LABELS
    buffer = io.BytesIO()
    np.save(buffer, labels.astype(_LABEL), allow_pickle=False)
    files.write_bytes(path, buffer.getvalue())
    manifest = {
        'format': FORMAT,
        'version': VERSION,
        **manifest,
        'labels_sha256': checksums.sha256(path),
    }
    files.write_json(paths.to_path(folder) / MANIFEST, manifest)


def read_manifest(folder) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      ValueError: it is missing, damaged or has another version.
    """
    path = paths.to_path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f'{folder} holds no finished latents (no manifest.json); run `python -m '
            'ism_jax.prepare_data` again to resume'
        )
    try:
        manifest = json.loads(paths.read_bytes(path))
        found = f'{manifest["format"]!r} version {manifest["version"]}'
    except (ValueError, KeyError, TypeError) as error:
        found = f'damaged ({error})'
    if found != f'{FORMAT!r} version {VERSION}':
        raise ValueError(
            f'{path} is {found}, not {FORMAT!r} version {VERSION}, which this ism_jax '
            'reads; prepare the latents again'
        )
    return manifest
