"""What samples are compared with: statistics of real images, computed once and kept.

Two conventions are read beside images: the NPZ files of ADM's evaluation (Dhariwal and
Nichol, arXiv 2105.05233) with `mu` and `sigma` of all training images, `mu_s` and
`sigma_s` of their spatial features, and `arr_0`, some of the images; and the same with
`mu` and `sigma` alone, as pytorch-fid and others write them. Both are of FID's
Inception network.
"""

from collections.abc import Callable, Mapping
import dataclasses
import io
import os
from pathlib import Path
import time
import warnings
import zipfile

import numpy as np

from ism_jax.evaluation import feature_network, frechet_distance, real_images
from ism_jax.runtime import files

# Part of the files' names: raise it when the same images have other statistics.
_VERSION = 1
# Outputs of a network of which statistics are taken, where it has them, and what they
# are called in ADM's files.
_OUTPUTS = {'features': ('mu', 'sigma'), 'spatial': ('mu_s', 'sigma_s')}
KEPT_FEATURES = 10_000  # As many real images as ADM's recall is measured with.
_BATCH = 512  # Images read at once.
_REPORT_EVERY = 30.0  # Seconds.


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images as a metric knows them.

    Attributes:
      moments: of `features` and, where there is such an output, `spatial`: their mean,
        [F], and covariance, [F, F], float64.
      features: [M, F] float32 of some of the images, for precision, recall and kernel
        distance; None where only statistics are known.
      count: images that the statistics are of; None where a file does not say.
      key: hash of the images, the network and its preprocessing: record it with scores.
      description: of the images, in words.
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
          statistics: of the same output of the samples.
          output: 'features', or 'spatial' for sFID.

        Raises:
          ValueError: there are no statistics of that output, or of other features.
        """
        if output not in self.moments:
            raise ValueError(
                f'the reference ({self.description}) has no statistics of {output!r}, '
                f'only of {", ".join(self.moments)}: compute it from images, or give '
                'an NPZ file that has them'
            )
        return frechet_distance.gaussian_distance(
            statistics.mean, statistics.covariance(), *self.moments[output]
        )


def load_or_compute(
    place,
    network: feature_network.FeatureNetwork,
    *,
    cache_dir=None,
    image_size: int | None = None,
    kept_features: int = KEPT_FEATURES,
    report: Callable[[str], object] = lambda message: None,
) -> Reference:
    """The reference of real images: from its file, or computed and then filed.

    A file that is missing, truncated or damaged, or a directory that cannot be written
    to, costs a computation but is never fatal.

    Args:
      place: see `real_images.open_images`; also an NPZ file of statistics.
      network: that looks at the images.
      cache_dir: directory of the files; None for no file.
      image_size: see `real_images.open_images`.
      kept_features: how many images `Reference.features` is of at most, chosen at
        random, always the same.
      report: is told in words what is done.

    Raises:
      ValueError: no images and no statistics of this network, fewer than 2 images, or
        damaged ones.
    """
    if kept_features < 1:
        raise ValueError(f'kept_features = {kept_features} must be at least 1')
    arrays = _array_names(place)
    given = _given_moments(place, network) if 'mu' in arrays else {}
    if arrays and 'arr_0' not in arrays:
        if not given:
            raise ValueError(
                f'{place} holds {", ".join(arrays)}: neither images (arr_0) nor '
                f'statistics of the network {network.name}; give images'
            )
        checksum = feature_network.file_checksum(place)
        key = _key(network, checksum, None, kept_features)
        return Reference(given, None, None, key, f'statistics of {place}')

    images = real_images.open_images(place, image_size=image_size)
    if len(images) < 2:
        raise ValueError(
            f'{images.description}: statistics need at least 2 images; give more'
        )
    key = _key(network, images.digest(), image_size, kept_features)
    path = None if cache_dir is None else Path(cache_dir) / f'reference-{key}.npz'
    computed = None if path is None else _load(path, key, images.description)
    if computed is None:
        computed = _compute(images, network, key, kept_features, report)
        if path is not None:
            _save(path, computed)
    else:
        report(f'reference: {computed.description}, from {path}')
    if given:
        # The images of ADM's files are some of those that the statistics are of.
        computed = dataclasses.replace(computed, moments=given, count=None)
    return computed


def _key(network, digest, image_size, kept_features) -> str:
    about = {'version': _VERSION, 'images': digest, 'image_size': image_size}
    about |= {'kept_features': kept_features} | network.identity
    return feature_network.identity_key(about)


def _compute(images, network, key, kept_features, report) -> Reference:
    total = len(images)
    report(f'reference: {network.name} looks at {images.description}')
    # RandomState, because NumPy promises that its stream never changes.
    chosen = np.zeros(total, bool)
    chosen[np.random.RandomState(0).permutation(total)[:kept_features]] = True
    statistics, kept, seen, told = {}, [], 0, time.monotonic()
    for batch in images.batches(_BATCH):
        out = network(batch)
        for name in _OUTPUTS:
            if name in out:
                if name not in statistics:
                    size = out[name].shape[1]
                    statistics[name] = frechet_distance.FeatureStatistics(size)
                statistics[name].update(out[name])
        kept.append(out['features'][chosen[seen : seen + len(batch)]])
        seen += len(batch)
        if time.monotonic() - told > _REPORT_EVERY:
            told = time.monotonic()
            report(f'reference: {seen:,} of {total:,} images')
    moments = {name: (s.mean, s.covariance()) for name, s in statistics.items()}
    features = np.concatenate(kept)
    return Reference(moments, features, total, key, images.description)


def _array_names(place) -> list[str]:
    """Names of the arrays of an NPZ file, none of anything else.

    Raises:
      ValueError: an NPZ file that is none.
    """
    if not isinstance(place, (str, os.PathLike)) or Path(place).suffix != '.npz':
        return []
    if not Path(place).is_file():
        raise ValueError(f'{place} is not a file; give the path of an NPZ file')
    try:
        with zipfile.ZipFile(place) as archive:
            return [name.removesuffix('.npy') for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f'{place} cannot be read as an NPZ file ({error}); fetch it again'
        ) from error


def _given_moments(place, network) -> dict:
    """Moments that an NPZ file holds, if they are of this network."""
    if network.distance != 'FID':
        return {}
    moments = {}
    try:
        with np.load(place, allow_pickle=False) as file:
            for output, (mean, covariance) in _OUTPUTS.items():
                if mean in file and covariance in file:
                    pair = file[mean], file[covariance]
                    moments[output] = tuple(np.asarray(m, np.float64) for m in pair)
    # Damaged bytes surface as many kinds of error: zip, zlib, header, value.
    except Exception as error:  # pylint: disable=broad-exception-caught
        raise ValueError(
            f'{place} is damaged, or holds more than numbers ({error}); fetch it again'
        ) from error
    if 'features' not in moments:
        raise ValueError(f'{place} has mu without sigma; give a file with both')
    for output, (mean, covariance) in moments.items():
        size = mean.size
        if mean.shape != (size,) or covariance.shape != (size, size):
            raise ValueError(
                f'{place}: statistics of {output} have the shapes {mean.shape} and '
                f'{covariance.shape}, not [F] and [F, F]; fetch it again'
            )
    return moments


def _save(path, reference: Reference) -> None:
    arrays = {'key': np.array(reference.key), 'features': reference.features}
    arrays['count'] = np.int64(reference.count)
    for output, (mean, covariance) in reference.moments.items():
        arrays[f'mean/{output}'], arrays[f'covariance/{output}'] = mean, covariance
    out = io.BytesIO()
    np.savez(out, **arrays)
    try:
        files.write_bytes(path, out.getvalue())
    except OSError as error:
        warnings.warn(
            f'reference file {path} cannot be written ({error}): the next run will '
            'compute it again; give a cache directory that can be written to',
            stacklevel=3,
        )


def _load(path, key, description) -> Reference | None:
    """The reference filed under `key`, or None."""
    if not path.exists():
        return None
    try:
        # A zip archive: every array has a checksum, which reading verifies.
        with np.load(path, allow_pickle=False) as file:
            if str(file['key']) != key:
                raise ValueError(f'it holds the reference {file["key"]}')
            moments = {
                output: (file[f'mean/{output}'], file[f'covariance/{output}'])
                for output in _OUTPUTS
                if f'mean/{output}' in file
            }
            features, count = file['features'], int(file['count'])
    # Damaged bytes surface as many kinds of error: zip, zlib, header, key, value.
    except Exception as error:  # pylint: disable=broad-exception-caught
        warnings.warn(
            f'reference file {path} cannot be read ({type(error).__name__}: {error}): '
            'computing it again and replacing it',
            stacklevel=3,
        )
        return None
    return Reference(moments, features, count, key, description)
