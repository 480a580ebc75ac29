"""Folders on this machine and repositories on the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
import re

from ism_jax.runtime import paths


def folder(path, names: Sequence[str], example: str) -> paths.Path:
    """The folder at a path, or the downloaded copy of a hub repository.

    Args:
      path: a folder, its URL in a bucket, or a hub id such as 'organisation/name'.
      names: files to download.
      example: a path or id, for the message.

    Raises:
      ValueError: `path` is neither, or the download failed.
    """
    given = paths.to_path(path).expanduser()
    if paths.is_bucket(given) or given.is_dir():
        return given
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', str(path)):
        raise ValueError(
            f'{path} is not a folder or a hub id; give one such as {example}'
        )
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=names))
    except Exception as error:  # The library raises many types, or is not installed.
        raise ValueError(
            f'{path} is not a folder and cannot be downloaded from the hub '
            f'({type(error).__name__}: {error}); pip install huggingface_hub, or give '
            'a folder with a copy'
        ) from error
