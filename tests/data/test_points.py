"""Data sets as points: every example once, under its class."""

import numpy as np

from ism_jax.data import array_source, points


def test_images_are_points_of_their_class():
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 1), np.uint8)
    labels = np.array([2, 0, 2, 2, 0, 3, 3, 0, 2])
    source = array_source.ArraySource('nine', images, labels, 'abcd')
    members = points.class_members(source)
    assert [m.tolist() for m in members] == [[1, 4, 7], [], [0, 2, 3, 8], [5, 6]]
    read = points.read_points(source, members, num_threads=3)
    assert all(p.dtype == np.float16 for p in read)
    assert [p.shape for p in read] == [(3, 24), (0, 24), (4, 24), (2, 24)]
    # float16 keeps the grey level.
    found = np.rint((read[2].astype(np.float32) + 1) * 127.5)
    np.testing.assert_array_equal(found, images[members[2]].reshape(4, 24))


def test_latents_are_points_at_their_posterior_means(
    tmp_path, encoder, prepare, open_latents
):
    prepare(tmp_path / 'out', encoder)
    source = open_latents(latent_mean=(0.1, 0.2, 0.3), latent_std=(0.5, 1.0, 2.0))
    members = points.class_members(source)
    read = points.read_points(source, members, num_threads=2)
    assert sum(map(len, read)) == len(source) == 44
    index = int(members[1][2])
    draws = [
        source.example(index, np.random.default_rng(seed)).ravel()
        for seed in range(400)
    ]
    deviation = np.std(draws, axis=0).max()
    assert deviation > 0
    np.testing.assert_allclose(
        read[1][2], np.mean(draws, axis=0), atol=5 * deviation / 20 + 2e-3
    )
