"""Samples in the formats that other programs score: ADM's NPZ, and a folder of PNGs.

ADM's evaluation (Dhariwal and Nichol, arXiv 2105.05233) reads `arr_0`, uint8
[N, H, W, 3], and `arr_1`, the labels; torch-fidelity and pytorch-fid read a folder.
"""

from collections.abc import Callable, Iterable
import zipfile

import numpy as np

from ism_jax.runtime import files, paths
from ism_jax.sampling import image_grid


def write_npz(
    folder, parts: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
) -> str:
    """Writes an NPZ file in ADM's layout atomically, without loading all samples.

    Args:
      folder: the folder to write to.
      parts: yields (images uint8 [n, H, W, 1 or 3], labels [n]), the same at each call;
        grey becomes three equal channels.

    Returns:
      The file's name, `samples_<N>x<H>x<W>x3.npz`.
    """
    labels, shape = [], None
    for images, label in parts():
        labels.append(np.asarray(label, np.int64))
        shape = (*images.shape[1:3], 3)
    labels = np.concatenate(labels)
    shape = (len(labels), *shape)
    path = paths.to_path(folder) / f'samples_{"x".join(map(str, shape))}.npz'
    with (
        files.replacing(path) as temporary,
        zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED) as archive,
    ):
        with archive.open('arr_0.npy', 'w', force_zip64=True) as file:
            _write_header(file, np.uint8, shape)
            for images, _ in parts():
                images = np.broadcast_to(images, (len(images), *shape[1:]))
                file.write(np.ascontiguousarray(images).data)
        with archive.open('arr_1.npy', 'w') as file:
            _write_header(file, np.int64, labels.shape)
            file.write(labels.data)
    return path.name


def write_pngs(
    folder, parts: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
) -> None:
    """Writes `00000000.png`, `00000001.png`, ... in the order of the samples.

    Args:
      folder: the folder to write to; it should hold no other files.
      parts: see `write_npz`.
    """
    number = 0
    for images, _ in parts():
        for image in images:
            image_grid.write_png(paths.to_path(folder) / f'{number:08d}.png', image)
            number += 1


def _write_header(file, dtype, shape) -> None:
    np.lib.format.write_array_header_1_0(
        file,
        {
            'descr': np.lib.format.dtype_to_descr(np.dtype(dtype)),
            'fortran_order': False,
            'shape': shape,
        },
    )
