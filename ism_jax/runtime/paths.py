"""Paths that users give: local ones, and URLs of buckets.

A local path is a `pathlib.Path`, the URL of an object or a folder in a bucket an
`epath.Path`. Both read, list and join in the same way. A bucket has no folders, only
names with slashes: there is nothing to create, and what differs from a file system is
here.
"""

from collections.abc import Iterator, Sequence
import contextlib
import errno
import glob
import importlib.util
import io
import os
import pathlib
import re
from typing import BinaryIO

# One client for all installs: with TensorFlow, etils would use TensorFlow's.
os.environ.setdefault('EPATH_USE_TF', '0')

from etils import epath  # noqa: E402
import fsspec  # noqa: E402

# Scheme of a URL -> the package that reads and writes such buckets.
CLIENTS = {'gs': 'gcsfs', 's3': 's3fs'}
# Where Orbax writes checkpoints; it has no client for others.
CHECKPOINTS = ('gs',)

Path = pathlib.Path | epath.Path

# Other processes write, so that a listing is only valid when it is made.
for _scheme in CLIENTS:
    fsspec.config.conf.setdefault(_scheme, {})['use_listings_cache'] = False


def from_user(path, name: str, schemes: Sequence[str] = tuple(CLIENTS)) -> Path:
    """The path of a file or folder that a user gave; `~` is expanded.

    Args:
      path: text or path-like.
      name: name of the flag or argument, for the message.
      schemes: the buckets that work here, of `CLIENTS`.

    Raises:
      ValueError: a URL that does not work here, a client that is not installed, or a
        bucket that is missing, refuses to list or does not answer.
    """
    # Path('gs://bucket') is 'gs:/bucket'; the text 'folder:/images' is no URL.
    mark = '://' if isinstance(path, str) else ':/'
    text = os.fspath(path)
    found = re.match(r'([A-Za-z][\w+.-]+)' + mark, text)
    if not found:
        return pathlib.Path(path).expanduser()
    scheme = found[1]
    if scheme not in schemes or f'{scheme}://' not in text:
        works = ' and '.join(f'{scheme}://' for scheme in schemes)
        raise ValueError(
            f'{name} {text} is a URL, and only local paths '
            + (f'and {works} work here' if works else 'work here')
            + '; mount the bucket, or copy to and from it'
        )
    if importlib.util.find_spec(CLIENTS[scheme]) is None:
        raise ValueError(
            f'{name} {text} needs the package {CLIENTS[scheme]}: '
            f'pip install {CLIENTS[scheme]}'
        )
    _check_bucket(text, name)
    return epath.Path(text.rstrip('/'))


def local_path(path, name: str) -> pathlib.Path:
    """Like `from_user`, where no URL works."""
    return from_user(path, name, ())


def to_path(path) -> Path:
    """A path, or its text, as a path; for paths that `from_user` has checked."""
    if isinstance(path, (pathlib.Path, epath.Path)):
        return path
    text = os.fspath(path)
    return epath.Path(text) if '://' in text else pathlib.Path(text)


def is_bucket(path) -> bool:
    """Whether a path is in a bucket."""
    return '://' in os.fspath(path)


def absolute(path) -> Path:
    """The absolute path; the URL of a bucket is one."""
    path = to_path(path)
    return path if is_bucket(path) else path.absolute()


def make_folder(path: Path) -> None:
    """Creates a folder and its parents, unless it is in a bucket."""
    if not is_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def size(path: Path) -> int:
    """Size of a file in bytes."""
    if is_bucket(path):
        with errors(path):
            return int(_client(path).info(os.fspath(path))['size'])
    return path.stat().st_size


def files_below(folder: Path) -> dict[str, int]:
    """Size in bytes of all files below a folder, by relative name with slashes."""
    folder = to_path(folder)
    if not is_bucket(folder):
        found = {p.relative_to(folder).as_posix(): p for p in folder.rglob('*')}
        return {name: p.stat().st_size for name, p in found.items() if p.is_file()}
    with errors(folder):
        client, text = _client(folder), os.fspath(folder)
        # The slash, so that 'run1' does not list 'run10'; clients drop it at times.
        prefix = client._strip_protocol(text).rstrip('/') + '/'
        found = client.find(f'{text}/', detail=True)
    return {
        name.removeprefix(prefix): int(about['size'])
        for name, about in sorted(found.items())
        if name.startswith(prefix) and not name.endswith('/')
    }


def find(pattern: str) -> list[Path]:
    """The files that match a pattern with the wildcards `*`, `?` and `**`."""
    if not is_bucket(pattern):
        found = map(pathlib.Path, glob.glob(pattern, recursive=True))
        return [path for path in found if path.is_file()]
    scheme = pattern.partition('://')[0]
    with errors(pattern):
        names = _client(pattern).glob(pattern)
    return [epath.Path(f'{scheme}://{name}') for name in names]


def read_bytes(path: Path) -> bytes:
    """The content of a file."""
    if not is_bucket(path):
        return path.read_bytes()
    with errors(path):
        # One request; opening a file asks for its size first.
        return _client(path).cat_file(os.fspath(path))


def open_file(path: Path) -> BinaryIO:
    """A file to read from at any position; an object of a bucket is in memory."""
    return io.BytesIO(read_bytes(path)) if is_bucket(path) else path.open('rb')


def put(path: Path, data: bytes) -> None:
    """Writes an object of a bucket in one request, completely or not at all."""
    with errors(path):
        _client(path).pipe_file(os.fspath(path), data)


def upload(local: pathlib.Path, path: Path) -> None:
    """Copies a local file to a bucket; it appears when all of it is there."""
    with errors(path):
        _client(path).put_file(str(local), os.fspath(path))


def download(path: Path, local: pathlib.Path) -> None:
    """Copies an object of a bucket to a local file."""
    with errors(path):
        _client(path).get_file(os.fspath(path), str(local))


def move_folder(source: Path, target: Path, *, first: Sequence[str] = ()) -> None:
    """Moves a folder; in a bucket each object is copied, then all are deleted.

    Args:
      source: the folder.
      target: must not exist.
      first: names that are deleted first, because they mark the folder as complete.
    """
    if not is_bucket(source):
        make_folder(target.parent)
        source.rename(target)
        return
    names = sorted(files_below(source), key=lambda name: name not in first)
    with errors(source):
        client = _client(source)
        for name in names:
            client.cp_file(os.fspath(source / name), os.fspath(target / name))
        for name in names:
            client.rm_file(os.fspath(source / name))


def remove_file(path: Path) -> None:
    """Deletes a file, if it exists."""
    with errors(path):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def errors(path) -> Iterator[None]:
    """Reports an error of a bucket's client as an `OSError` that names the object.

    Clients raise errors of HTTP, of their own and of the system, after they have
    retried for about half a minute.
    """
    if not is_bucket(path):
        yield
        return
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise OSError(
            errno.EACCES if _is_denied(error) else errno.EIO, reason, os.fspath(path)
        ) from error


def raise_if_unreachable(path, error: Exception) -> None:
    """Raises an error of reading from a bucket that says nothing about the file."""
    unreachable = isinstance(error, OSError) and error.errno in (
        errno.EACCES,
        errno.EIO,
    )
    if is_bucket(path) and unreachable:
        raise error


def _is_denied(error: Exception) -> bool:
    """Whether a client's error says that access is denied."""
    code = str(getattr(error, 'code', ''))
    denied = isinstance(error, PermissionError) or code in ('401', '403')
    return denied or str(error).startswith('Forbidden')


def _client(path):
    return fsspec.filesystem(os.fspath(path).partition('://')[0])


def _check_bucket(text: str, name: str) -> None:
    """Lists a folder of a bucket.

    Raises:
      ValueError: see `from_user`.
    """
    bucket = '/'.join(text.split('/')[:3])
    try:
        with errors(text):
            client = _client(text)
            try:
                client.ls(text)
            except FileNotFoundError:
                client.ls(bucket)  # A new folder in a bucket that exists.
    except FileNotFoundError as error:
        raise ValueError(f'{name} {text}: there is no bucket {bucket}') from error
    except PermissionError as error:
        raise ValueError(
            f'{name} {text}: access is denied ({error.strerror}); log in, or ask for '
            f'the right to list, read and write objects of {bucket}'
        ) from error
    except OSError as error:
        raise ValueError(
            f'{name} {text} cannot be reached ({error.strerror}); try again later'
        ) from error
