"""Statistics of real images that samples are compared with, computed once and cached.

Besides images, two kinds of NPZ file are read. Those of ADM's evaluation (Dhariwal and
Nichol, arXiv 2105.05233) have `mu` and `sigma` of all training images, `mu_s` and
`sigma_s` of their spatial features, and some of the images as `arr_0`. pytorch-fid and
others write only `mu` and `sigma`. Both come from FID's Inception network.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
from pathlib import Path
import time
import zipfile

import numpy as np

from ism_jax.evaluation import feature_network, frechet_distance, npz_cache, real_images
from ism_jax.runtime import checksums, files, paths

# Part of the cache key: increase it if the same images get different statistics.
_VERSION = 1
# Network outputs, and the names of their statistics in ADM's files.
_OUTPUTS = {'features': ('mu', 'sigma'), 'spatial': ('mu_s', 'sigma_s')}
KEPT_FEATURES = 10_000  # ADM measures recall with this many real images.
_BATCH = 512  # Images read at once.
_LOG_EVERY = 30.0  # Seconds.


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics and features of real images.

    Attributes:
      moments: mean [F] and covariance [F, F], float64, of `features` and, if the
        network has them, of `spatial` features.
      features: [M, F] float32 of some of the images, for precision, recall and kernel
        distance; None if only statistics are known.
      count: number of images behind the statistics; None if a file does not state it.
      key: hash of the images, the network and its preprocessing, recorded with scores.
      description: description of the images, for the record.
    """

    moments: Mapping[str, tuple[np.ndarray, np.ndarray]]
    features: np.ndarray | None
    count: int | None
    key: str
    description: str

    def distance(
        self, statistics: frechet_distance.FeatureStatistics, output: str = 'features'
    ) -> float:
        """Frechet distance of samples to these images.

        Args:
          statistics: statistics of the samples for the same output.
          output: 'features', or 'spatial' for sFID.
        """
        return frechet_distance.gaussian_distance(
            statistics.mean, statistics.covariance(), *self.moments[output]
        )


def load_or_compute(
    origin,
    network: feature_network.FeatureNetwork,
    *,
    cache_dir=None,
    image_size: int | None = None,
    kept_features: int = KEPT_FEATURES,
    log: Callable[[str], object] = lambda message: None,
) -> Reference:
    """The reference of real images, from the cache or computed.

    A damaged cache file or a read-only cache folder causes a warning and recomputation.

    Args:
      origin: see `real_images.open_images`; or an NPZ file of statistics.
      network: extracts the features.
      cache_dir: folder of the cached files; None for no cache.
      image_size: see `real_images.open_images`; None unless `origin` is a folder.
      kept_features: maximum number of images in `Reference.features`, a fixed random
        choice.
      log: called with progress messages.

    Raises:
      ValueError: `origin` has neither images nor statistics of this network, has fewer
        than 2 images, or is damaged.
    """
    arrays = _array_names(origin)
    moments = _read_moments(origin, network) if 'mu' in arrays else {}
    if arrays and 'arr_0' not in arrays:
        if not moments:
            raise ValueError(
                f'{origin} holds {", ".join(arrays)}: neither images (arr_0) nor '
                f'statistics of the network {network.name}; give images'
            )
        checksum = checksums.sha256(origin)
        key = _key(network, checksum, None, kept_features)
        return Reference(moments, None, None, key, f'statistics of {origin}')

    images = real_images.open_images(origin, image_size=image_size)
    if len(images) < 2:
        raise ValueError(
            f'{images.description}: statistics need at least 2 images; give more'
        )
    key = _key(network, images.digest(), image_size, kept_features)
    path = None if cache_dir is None else Path(cache_dir) / f'reference-{key}.npz'
    reference = None if path is None else _load(path, key, images.description)
    if reference is not None:
        log(f'reference: {reference.description}, from {path}')
    else:
        reference = _compute(images, network, key, kept_features, log)
        if path is not None:
            _save(path, reference)
    if moments:
        # ADM's statistics are of all training images; arr_0 holds only some of them.
        reference = dataclasses.replace(reference, moments=moments, count=None)
    return reference


def _key(network, digest, image_size, kept_features) -> str:
    identity = {'version': _VERSION, 'images': digest, 'image_size': image_size}
    identity |= {'kept_features': kept_features} | network.identity
    return feature_network.identity_key(identity)


def _compute(images, network, key, kept_features, log) -> Reference:
    total = len(images)
    log(f'reference: extracting features of {network.name} from {images.description}')
    # RandomState, because NumPy guarantees that its stream never changes.
    chosen = np.zeros(total, bool)
    chosen[np.random.RandomState(0).permutation(total)[:kept_features]] = True
    statistics, kept, done, last_log = {}, [], 0, time.monotonic()
    for batch in images.batches(_BATCH):
        out = network(batch)
        for name in _OUTPUTS:
            if name in out:
                if name not in statistics:
                    size = out[name].shape[1]
                    statistics[name] = frechet_distance.FeatureStatistics(size)
                statistics[name].update(out[name])
        kept.append(out['features'][chosen[done : done + len(batch)]])
        done += len(batch)
        if time.monotonic() - last_log > _LOG_EVERY:
            last_log = time.monotonic()
            log(f'reference: {done:,} of {total:,} images')
    moments = {name: (s.mean, s.covariance()) for name, s in statistics.items()}
    return Reference(moments, np.concatenate(kept), total, key, images.description)


def _array_names(origin) -> list[str]:
    """Names of the arrays of an NPZ file; empty for any other origin."""
    if (
        not isinstance(origin, (str, os.PathLike))
        or paths.to_path(origin).suffix != '.npz'
    ):
        return []
    try:
        origin = paths.to_path(origin)
        with paths.open_file(origin) as file, zipfile.ZipFile(file) as archive:
            return [name.removesuffix('.npy') for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f'{origin} cannot be read as an NPZ file ({error}); give the path of one, '
            'or download it again'
        ) from error


def _read_moments(path, network) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The moments of an NPZ file; empty unless they are of this network."""
    if network.distance != 'FID':
        return {}
    moments, problem = {}, ''
    try:
        with files.open_npz(path) as file:
            for output, (mean, covariance) in _OUTPUTS.items():
                if mean in file and covariance in file:
                    pair = file[mean], file[covariance]
                    moments[output] = tuple(np.asarray(m, np.float64) for m in pair)
    # Damaged bytes surface as many kinds of error: zip, zlib, header, value.
    except Exception as error:  # pylint: disable=broad-exception-caught
        problem = f'it is damaged, or holds more than numbers ({error})'
    if not problem and 'features' not in moments:
        problem = 'it has mu without sigma'
    for output, (mean, covariance) in moments.items():
        shapes_fit = mean.ndim == 1 and covariance.shape == 2 * mean.shape
        finite = np.isfinite(mean).all() and np.isfinite(covariance).all()
        if not shapes_fit or not finite or not _is_symmetric(covariance):
            problem = (
                f'{output} have a mean {mean.shape} and a covariance '
                f'{covariance.shape}, expected finite [F] and symmetric [F, F]'
            )
    if problem:
        raise ValueError(f'{path} has no usable statistics: {problem}; replace it')
    return moments


def _is_symmetric(covariance) -> bool:
    asymmetry = np.abs(covariance - covariance.T).max()
    return asymmetry <= 1e-8 * np.abs(covariance).max()


def _save(path, reference: Reference) -> None:
    arrays = {'features': reference.features, 'count': np.int64(reference.count)}
    for output, (mean, covariance) in reference.moments.items():
        arrays[f'mean/{output}'], arrays[f'covariance/{output}'] = mean, covariance
    npz_cache.write(path, reference.key, arrays)


def _load(path, key, description) -> Reference | None:
    """The cached reference of `key`, or None."""
    arrays = npz_cache.read(path, key)
    if arrays is None:
        return None
    moments = {
        output: (arrays[f'mean/{output}'], arrays[f'covariance/{output}'])
        for output in _OUTPUTS
        if f'mean/{output}' in arrays
    }
    count = int(arrays['count'])
    return Reference(moments, arrays['features'], count, key, description)
