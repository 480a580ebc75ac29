"""Copies of the files of prepared latents on a local disk.

A bucket serves a record in milliseconds and a shard at the network's speed, so the
shards are copied once, before training, and not read record by record.
"""

from concurrent import futures
import hashlib
import pathlib
import shutil

from absl import logging

from ism_jax.data import latents
from ism_jax.runtime import checksums, files, lock, paths

THREADS = 8  # Files that are copied at once.


def local_copy(folder: paths.Path, cache_dir) -> pathlib.Path:
    """A local folder with the files of finished latents in a bucket.

    Each file is copied under a temporary name, compared with its SHA-256 in the
    manifest and renamed, so a stopped copy resumes. The processes of one machine share
    the copy: one makes it and the others wait. Latents with the same manifest use the
    same copy again.

    Args:
      folder: URL of the latents.
      cache_dir: local folder of the copies of all latents.

    Raises:
      ValueError: there is too little room, or a file is not the one that the manifest
        describes.
    """
    manifest = latents.read_manifest(folder)
    content = paths.read_bytes(folder / latents.MANIFEST)
    name = hashlib.sha256(content).hexdigest()[:16]
    target = paths.local_path(cache_dir, 'the cache folder') / name
    expected = {s['name']: (s['bytes'], s['sha256']) for s in manifest['shards']}
    expected[latents.LABELS] = (None, manifest['labels_sha256'])
    with lock.Lock(target, wait=True):
        missing = [n for n, (size, _) in expected.items() if not _has(target / n, size)]
        _check_room(target, sum(expected[n][0] or 0 for n in missing))
        if missing:
            logging.warning(
                'copying %d files of %s to %s', len(missing), folder, target
            )
        with futures.ThreadPoolExecutor(THREADS) as pool:
            copy = lambda n: _copy(folder / n, target / n, expected[n][1])
            list(pool.map(copy, missing))
        (target / latents.MANIFEST).write_bytes(content)
    return target


def _has(path: pathlib.Path, size: int | None) -> bool:
    """Whether a file was copied; complete files have their name and size."""
    return path.is_file() and size in (None, path.stat().st_size)


def _check_room(folder: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f'the cache folder {folder} has {free / 1e9:.1f} GB free, and the latents '
            f'need {needed / 1e9:.1f} GB more; make room or choose another disk'
        )


def _copy(source: paths.Path, target: pathlib.Path, sha256: str) -> None:
    with files.replacing(target) as temporary:
        try:
            paths.download(source, temporary)
        except FileNotFoundError as error:
            raise ValueError(
                f'{source} is missing; prepare the latents again'
            ) from error
        if checksums.sha256(temporary) != sha256:
            raise ValueError(
                f'{source} is not the file that the manifest describes; remove it and '
                f'{latents.MANIFEST} and run ism_jax.prepare_data again'
            )
