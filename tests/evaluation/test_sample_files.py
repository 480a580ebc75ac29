"""Samples in the formats of other programs."""

import numpy as np

from ism_jax.evaluation import sample_files


def test_an_npz_file_is_written_part_by_part(tmp_path):
    random = np.random.default_rng(0)
    parts = [
        (random.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8), np.full(n, n))
        for n in (3, 1, 2)
    ]
    name = sample_files.write_npz(tmp_path, lambda: iter(parts))
    assert name == 'samples_6x4x4x3.npz' and len(list(tmp_path.iterdir())) == 1
    with np.load(tmp_path / name, allow_pickle=False) as file:
        np.testing.assert_array_equal(
            file['arr_0'], np.concatenate([images for images, _ in parts])
        )
        np.testing.assert_array_equal(file['arr_1'], [3, 3, 3, 1, 2, 2])
