"""Image files in a folder, one subfolder per class."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from ism_jax.data import encoded_source
from ism_jax.runtime import paths

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')


class FolderSource(encoded_source.EncodedSource):
    """A source of image files, one subfolder per class, in sorted order.

    A class folder may have subfolders. Names that begin with a dot are ignored.

    Args:
      path: the folder, local or in a bucket.
      image_size, channels, on_corrupt: see `EncodedSource`.

    Raises:
      ValueError: no folder, no images, a class without images, an image in no class.
    """

    def __init__(
        self, path: str, *, image_size: int, channels: int, on_corrupt: str = 'error'
    ):
        self.path = paths.from_user(path, 'folder')
        classes = _list_classes(self.path)
        # Names relative to the folder, to save memory: there may be millions.
        self._files = [file for files in classes.values() for file, _ in files]
        counts = [len(files) for files in classes.values()]
        digest = hashlib.sha256()
        for files in classes.values():
            digest.update('\n'.join(f'{file} {n}' for file, n in files).encode())
        self._digest = digest.hexdigest()[:12]
        super().__init__(
            self.path,
            np.repeat(np.arange(len(counts)), counts),
            classes,
            image_size=image_size,
            channels=channels,
            on_corrupt=on_corrupt,
        )

    def encoded(self, index):
        path = self.path / self._files[index]
        return io.BytesIO(paths.read_bytes(path)) if paths.is_bucket(path) else path

    def name_of(self, index):
        return str(self.path / self._files[index])

    def __repr__(self):
        return (
            f'FolderSource({str(self.path)!r}, {len(self)} images, '
            f'{self.num_classes} classes, {self.image_shape}, listing {self._digest})'
        )


def _list_classes(path: paths.Path) -> dict[str, list[tuple[str, int]]]:
    """The files of each class as (name relative to `path`, size in bytes), sorted."""
    entries, classes = [], {}
    if paths.is_bucket(path):
        entries, classes = _list_bucket(path)
    elif path.is_dir():
        entries = sorted(p for p in path.iterdir() if not p.name.startswith('.'))
        names = [entry.name for entry in entries if entry.is_dir()]
        classes = {name: sorted(_list_images(path / name, name)) for name in names}
    loose = [entry for entry in entries if is_image(entry.name)]
    empty = [path / name for name, files in classes.items() if not files]
    if loose:
        problem = f'{loose[0]} is in no class ({len(loose)} such images)'
    elif empty:
        problem = f'{empty[0]} holds no images ({", ".join(IMAGE_SUFFIXES)})'
    elif not classes:
        problem = f'{path} is not a folder with subfolders'
    else:
        return classes
    raise ValueError(
        f'{problem}; every subfolder is a class, so put the images of each class into '
        'one (all images into one subfolder if there are no classes)'
    )


def _list_bucket(path: paths.Path):
    """The objects that are in no class, and what `_list_classes` returns."""
    loose, classes = [], {}
    for name, size in paths.files_below(path).items():
        folder, *rest = name.split('/')
        if any(part.startswith('.') for part in (folder, *rest[:-1])):
            continue
        if not rest:
            loose.append(path / name)
            continue
        files = classes.setdefault(folder, [])
        if is_image(rest[-1]):
            files.append((name, size))
    return loose, {name: sorted(classes[name]) for name in sorted(classes)}


def is_image(name: str) -> bool:
    """Whether a file name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith('.')


def _list_images(folder: Path, name: str, parents: tuple[Path, ...] = ()):
    """Yields (`name`/file with forward slashes, size in bytes), recursively."""
    real = folder.resolve()
    if real in parents:
        return  # Following a link to a parent folder would never end.
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith('.'):
                yield from _list_images(
                    folder / entry.name, f'{name}/{entry.name}', (*parents, real)
                )
            elif is_image(entry.name):
                # A broken link has no size and is reported when it is read. Reading a
                # pipe or a device would block.
                exists = os.path.exists(entry.path)
                if not exists or entry.is_file():
                    yield f'{name}/{entry.name}', entry.stat().st_size if exists else 0
