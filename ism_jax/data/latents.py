"""Latents on disk: what `ism_jax.prepare_data` writes and training reads.

A folder of ArrayRecord shards, with `manifest.json` that says what they are and
`labels.npy`, the label of every record in order. A record is, without a header,

    label            int32
    mean             [2, h, w, c]  of the autoencoder's posterior
    log_variance     [2, h, w, c]

in the manifest's `dtype`, little-endian. The first of the two is of the image as it
is, the second of its mirror image: a latent cannot be mirrored, as the autoencoder is
not symmetric. Means and log-variances are the encoder's own; the scale that makes
training's latents of them (0.18215 for Stable Diffusion's) is applied when they are
read, so a record does not depend on it.
"""

from collections.abc import Iterable
import hashlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ism_jax.runtime import files

FORMAT = 'ism_jax latents'
VERSION = 1
DTYPES = ('float16', 'float32')
_LABEL = np.dtype('<i4')


class Record(NamedTuple):
    """One image's posterior.

    Attributes:
      label: its class.
      mean, log_variance: [2, h, w, c]; the image's and its mirror image's.
    """

    label: int
    mean: np.ndarray
    log_variance: np.ndarray


class ChannelMoments:
    """Mean and deviation of latents over images and places, for each channel.

    Of samples of the posterior: its variance is part of theirs. Sums in float64.
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
        """Of what `to_json` gave."""
        out = cls()
        for count, total, squares in parts:
            out._count += count
            out._sum = out._sum + np.asarray(total)
            out._squares = out._squares + np.asarray(squares)
        return out

    def statistics(self) -> dict[str, list[float]]:
        """`channel_mean` and `channel_std`, as `data.latent_mean` and `_std` want."""
        mean = self._sum / self._count
        std = np.sqrt(self._squares / self._count - np.square(mean))
        return {'channel_mean': mean.tolist(), 'channel_std': std.tolist()}


def pack(record: Record, dtype: str) -> bytes:
    """The bytes of a record.

    Raises:
      ValueError: a value is not finite in that dtype.
    """
    arrays = [np.asarray(a, np.float32) for a in (record.mean, record.log_variance)]
    # Overflow is caught in the next line, with a name.
    with np.errstate(over='ignore'):
        stored = [a.astype(np.dtype(dtype).newbyteorder('<')) for a in arrays]
    for name, array in zip(('mean', 'log_variance'), stored):
        if not np.isfinite(array).all():
            raise ValueError(
                f'a {name} of the autoencoder is not finite in {dtype}; check the '
                'image and the weights, or prepare with --dtype float32'
            )
    label = np.array(record.label, _LABEL)
    return b''.join(part.tobytes() for part in (label, *stored))


def unpack(data: bytes, shape: tuple[int, int, int], dtype: str) -> Record:
    """Inverse of `pack`, as float32.

    Args:
      data: of one record.
      shape: [h, w, c] of a latent.
      dtype: one of `DTYPES`.

    Raises:
      ValueError: the length is not that of a record of this shape and dtype.
    """
    kind = np.dtype(dtype).newbyteorder('<')
    size = 2 * int(np.prod(shape))
    expected = _LABEL.itemsize + 2 * size * kind.itemsize
    if len(data) != expected:
        raise ValueError(
            f'a record of {len(data)} bytes is not one of latents {shape} in {dtype}, '
            f'which has {expected}'
        )
    label = np.frombuffer(data, _LABEL, 1)[0]
    values = np.frombuffer(data, kind, offset=_LABEL.itemsize).astype(np.float32)
    mean, log_variance = values.reshape(2, 2, *shape)
    return Record(int(label), mean, log_variance)


def shard_name(index: int, count: int) -> str:
    return f'latents-{index:05d}-of-{count:05d}.array_record'


def file_digest(path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def write_manifest(folder, manifest: dict[str, Any], labels: np.ndarray) -> None:
    """Writes `labels.npy` and then `manifest.json`, which makes the folder whole."""
    path = Path(folder) / 'labels.npy'
    files.write_bytes(path, _npy(labels.astype(_LABEL)))
    manifest = {
        'format': FORMAT,
        'version': VERSION,
        **manifest,
        'labels_sha256': file_digest(path),
    }
    text = json.dumps(manifest, indent=1) + '\n'
    files.write_bytes(Path(folder) / 'manifest.json', text.encode())


def read_manifest(folder) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      ValueError: there is none, or it is not one that this version reads.
    """
    path = Path(folder) / 'manifest.json'
    if not path.is_file():
        raise ValueError(
            f'{folder} holds no finished latents (no manifest.json); run `python -m '
            'ism_jax.prepare_data` again, it goes on where it stopped'
        )
    try:
        manifest = json.loads(path.read_text())
        known = manifest['format'] == FORMAT and manifest['version'] == VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is damaged ({error}); prepare again') from error
    if not known:
        raise ValueError(
            f'{path} is {manifest["format"]!r} version {manifest["version"]}; this '
            f'ism_jax reads {FORMAT!r} version {VERSION}'
        )
    return manifest


def _npy(array: np.ndarray) -> bytes:
    """The bytes of an NPY file."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()
