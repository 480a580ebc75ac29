"""Folders and files by the ids of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
import re


def folder(path, names: Sequence[str], example: str) -> Path:
    """A folder that is here, or the one that a hub id names, fetched.

    Args:
      path: of a folder, or an id such as 'organisation/name'.
      names: of the files that are fetched.
      example: of an id, for the message.

    Raises:
      ValueError: it is neither, or cannot be fetched.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        return given
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', str(path)):
        raise ValueError(
            f'{path} is no folder and no hub id; give such as {example} or the folder '
            'of a copy'
        )
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=names))
    except Exception as error:  # Of many kinds, for many reasons; also if missing.
        raise ValueError(
            f'{path} is no folder here, and could not be fetched from the hub '
            f'({type(error).__name__}: {error}); pip install huggingface_hub, or give '
            'the folder of a copy'
        ) from error
