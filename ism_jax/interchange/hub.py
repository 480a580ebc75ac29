"""Folders on this machine and repositories on the Hugging Face hub."""

from collections.abc import Sequence
import contextlib
from pathlib import Path
import re

from ism_jax.runtime import paths

REPOSITORY = r'[\w.-]+/[\w.-]+'


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
    if not re.fullmatch(REPOSITORY, str(path)):
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


def create(repository: str, *, private: bool) -> str:
    """Creates a repository that does not exist; checks that its files may be written.

    The access token is that of `hf auth login` or of the environment (HF_TOKEN).

    Args:
      repository: hub id.
      private: whether only its owner may see it.

    Returns:
      Its address.

    Raises:
      ValueError: huggingface_hub is missing, the id is malformed, the repository is
        public although `private` is requested, or the hub refuses.
    """
    if not re.fullmatch(REPOSITORY, repository):
        raise ValueError(f'--repo {repository} is not a hub id such as user/name')
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            'push needs huggingface_hub: pip install huggingface_hub'
        ) from error
    api = huggingface_hub.HfApi()
    with _in_one_line(repository):
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        public = private and not api.model_info(repository).private
    if public:
        raise ValueError(
            f'{repository} exists and is public; make it private on the hub, or push '
            'without --private'
        )
    return str(address)


def upload(path, repository: str, message: str) -> None:
    """Uploads a folder to a repository, as one commit.

    Args:
      path: folder with the files.
      repository: hub id, see `create`.
      message: of the commit.

    Raises:
      ValueError: the hub refuses.
    """
    import huggingface_hub

    with _in_one_line(repository):
        huggingface_hub.HfApi().upload_folder(
            repo_id=repository, folder_path=path, commit_message=message
        )


@contextlib.contextmanager
def _in_one_line(repository: str):
    """Raises the hub's errors, which are of many types, as a ValueError."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        reason = (
            f'status {status}: log in with hf auth login, or set HF_TOKEN, with a '
            'token that may write there'
            if status in (401, 403)
            else f'{type(error).__name__}: {error}'
        )
        raise ValueError(
            f'{repository} cannot be written on the hub ({reason})'
        ) from error
