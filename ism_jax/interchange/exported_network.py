"""A network in a folder: `model.safetensors` and `config.json`, for any program.

`model.safetensors` holds float32 tensors. Their names are the paths in the tree of
parameters, joined with '/'; layers are stacked on the first axis of `blocks/...`,
kernels are [inputs, outputs]. Its metadata say the format and its version, and keep
the SHA-256 of the tensors and of `config.json`, so that a file that was damaged,
edited or mixed up is refused.

`config.json` holds the resolved config, names of the classes, shape of the images, the
steps trained, where the network comes from, what it predicts, and the modules that are
not in the file because they are to start afresh.
"""

from collections.abc import Sequence
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import ml_collections
import numpy as np
import safetensors.numpy

from ism_jax import config as config_lib
from ism_jax import experiment
from ism_jax.interchange import tensor_file
from ism_jax.models import sit
from ism_jax.runtime import files

TENSORS, CONFIG = 'model.safetensors', 'config.json'
FORMAT, VERSION = 'ism_jax', '1'
# Fields of the network that change what the same parameters compute; no shape shows
# the first two.
FUNCTION_FIELDS = (
    'time_scale', 'num_heads', 'patch_size', 'hidden_size', 'depth', 'mlp_ratio',
    'step_embedding',
)  # fmt: skip


class Network(NamedTuple):
    """What a folder holds.

    Attributes:
      config: of the run, or of the network alone where it was converted.
      params: by module; float32 NumPy arrays when read.
      step: how many steps ism_jax trained it.
      class_names: of the labels.
      image_shape: (H, W, C).
      origin: where it comes from, in words.
      predicts: 'velocity', or 'noise' where it can only start a training.
      fresh: modules that are missing in `params`, to be initialised.
    """

    config: ml_collections.ConfigDict
    params: dict[str, Any]
    step: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    origin: str
    predicts: str = 'velocity'
    fresh: tuple[str, ...] = ()

    def model(self) -> sit.SiT:
        return experiment.make_model(self.config, len(self.class_names))


def exists(folder) -> bool:
    """Whether the folder holds a network, whole or not."""
    return any((Path(folder) / name).exists() for name in (TENSORS, CONFIG))


def write(folder, network: Network) -> None:
    """Writes both files.

    Raises:
      ValueError: the folder is that of a run, or the parameters are not those of the
        network that the config describes.
    """
    folder = Path(folder)
    if (folder / 'run.json').exists():
        raise ValueError(f'{folder} holds a run; give another folder to write to')
    content = {
        'config': json.loads(config_lib.to_json(network.config)),
        'class_names': list(network.class_names),
        'image_shape': list(network.image_shape),
        'step': int(network.step),
        'origin': network.origin,
        'predicts': network.predicts,
        'fresh': list(network.fresh),
    }
    text = (json.dumps(content, indent=1) + '\n').encode()
    tensors = {
        name: np.ascontiguousarray(leaf)
        for name, leaf in _flatten(jax.device_get(network.params)).items()
    }
    check_params(network, network.model(), network.image_shape, folder)
    metadata = {
        'format': FORMAT,
        'version': VERSION,
        'config_sha256': hashlib.sha256(text).hexdigest(),
        'tensors_sha256': digest(tensors),
    }
    files.write_bytes(folder / TENSORS, safetensors.numpy.save(tensors, metadata))
    files.write_bytes(folder / CONFIG, text)


def read(folder) -> Network:
    """Reads what `write` wrote.

    Raises:
      ValueError: a file is missing, damaged, edited, of another program or of a newer
        version.
    """
    folder = Path(folder)
    for name in (TENSORS, CONFIG):
        if not (folder / name).is_file():
            raise ValueError(
                f'{folder} holds no exported network: there is no {name}; give a '
                'folder that python -m ism_jax.convert wrote'
            )
    tensors, metadata = tensor_file.read_safetensors(folder / TENSORS)
    if metadata.get('format') != FORMAT:
        raise ValueError(
            f'{folder / TENSORS} was not written by ism_jax (its format is '
            f'{metadata.get("format")!r}); python -m ism_jax.convert takes checkpoints '
            'of other programs'
        )
    if metadata.get('version') != VERSION:
        raise ValueError(
            f'{folder / TENSORS} is of version {metadata.get("version")!r} of the '
            f'format, and this program reads {VERSION!r}; use the ism_jax that wrote it'
        )
    text = (folder / CONFIG).read_bytes()
    if hashlib.sha256(text).hexdigest() != metadata.get('config_sha256'):
        raise ValueError(
            f'{folder / CONFIG} is not the one that {TENSORS} was written with: it was '
            'edited, truncated or belongs to another network; export again'
        )
    if digest(tensors) != metadata.get('tensors_sha256'):
        raise ValueError(
            f'the tensors of {folder / TENSORS} are not those that were written: the '
            'file was edited or damaged; export again'
        )
    content = json.loads(text)
    network = Network(
        config=config_lib.from_json(json.dumps(content['config'])),
        params=traverse_util.unflatten_dict(tensors, sep='/'),
        step=content['step'],
        class_names=tuple(content['class_names']),
        image_shape=tuple(content['image_shape']),
        origin=content['origin'],
        predicts=content['predicts'],
        fresh=tuple(content['fresh']),
    )
    check_params(network, network.model(), network.image_shape, folder)
    return network


def initialised(network: Network) -> dict[str, Any]:
    """All parameters: those of the network, and its fresh modules at d = 0, w = 0.

    The fresh ones are the same every time; a training draws its own.
    """
    model, shape, names = network.model(), network.image_shape, network.fresh

    @jax.jit  # Makes these modules alone.
    def make(key):
        params = sit.init_params(model, shape, key)
        return {name: params[name] for name in names}

    return {**network.params, **make(jax.random.key(0))}


def with_classes(network: Network, class_names: Sequence[str]) -> Network:
    """The network for data of other classes; as it is where they are as many.

    Each new class begins as no class, which the network knows: without labels it
    computes what it did.
    """
    table = network.params.get('class_embedding')
    if table is None or len(class_names) == len(network.class_names):
        return network
    null = np.asarray(table['embedding'])[-1:]
    table = {'embedding': np.repeat(null, len(class_names) + 1, axis=0)}
    return network._replace(
        params={**network.params, 'class_embedding': table},
        class_names=tuple(class_names),
    )


def check_start(
    network: Network, model: sit.SiT, image_shape: tuple[int, int, int], folder
) -> None:
    """Whether `model` can start from the network and then computes the same.

    Images may have another side: positions are not learned. For other classes see
    `with_classes`.

    Raises:
      ValueError: naming the first field or parameter that differs.
    """
    theirs = network.model()
    for name in FUNCTION_FIELDS:
        mine, other = getattr(model, name), getattr(theirs, name)
        if mine == other or name in network.fresh:
            continue
        raise ValueError(
            f'model.{name} = {mine!r}, but the network in {folder} has {other!r}; set '
            f'--config.model.{name}={other!r}, or train.init_from to another network'
        )
    check_params(network, model, image_shape, folder)


def check_params(
    network: Network, model: sit.SiT, image_shape: tuple[int, int, int], folder
) -> None:
    """Whether parameters, but for the fresh modules, are those of the model.

    Raises:
      ValueError: naming the first parameter that is not, with shapes.
    """
    abstract = sit.abstract_params(model, image_shape)
    expected = _flatten({n: t for n, t in abstract.items() if n not in network.fresh})
    given = _flatten(network.params)
    for name in sorted(expected.keys() | given.keys()):
        shapes = [
            f'{tuple(tree[name].shape)} {tree[name].dtype}'
            if name in tree
            else 'missing'
            for tree in (given, expected)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f'{name} is {shapes[0]} in the network of {folder}, and {shapes[1]} in '
                f'the model that its config, or yours, describes for images of '
                f'{tuple(image_shape)}'
            )


def _flatten(params) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep='/')


def digest(tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of arrays with their names, types and shapes, hexadecimal."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        content.update(f'{name} {array.dtype} {array.shape}\n'.encode())
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def params_digest(params) -> str:
    """`digest` of a tree of parameters: that of the file that `write` makes of it."""
    return digest({n: np.asarray(leaf) for n, leaf in _flatten(params).items()})
