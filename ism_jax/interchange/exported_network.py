"""A network in a folder that any program can read: weights and a description.

`model.safetensors` holds float32 tensors. Their names are the paths in the parameter
tree, joined with '/'; layers are stacked on the first axis of `blocks/...`, and kernels
are [inputs, outputs]. Its metadata hold the format, the version, and the SHA-256 of the
tensors and of `config.json`, so that a damaged, edited or mismatched file is detected.

`config.json` holds the resolved config, which this module does not interpret, and the
other fields of `ExportedNetwork`.
"""

from collections.abc import Sequence
import hashlib
import json
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import numpy as np
import safetensors.numpy

from ism_jax.interchange import tensor_file, tensor_shapes
from ism_jax.models import conditions, sit
from ism_jax.runtime import files, paths

TENSORS, CONFIG = 'model.safetensors', 'config.json'
FORMAT, VERSION = 'ism_jax', '1'
# Attributes of the model that change what the same parameters compute. The shapes do
# not determine the first two.
FUNCTION_FIELDS = (
    'time_scale',
    'num_heads',
    'patch_size',
    'hidden_size',
    'depth',
    'mlp_ratio',
    'step_embedding',
    'guidance_embedding',
)


class ExportedNetwork(NamedTuple):
    """The content of a folder.

    Attributes:
      config: resolved config of the run or the conversion, as `json` reads it.
      params: parameters by module; float32 NumPy arrays when read.
      step: number of training steps in ism_jax.
      class_names: names of the labels, in order.
      image_shape: (H, W, C).
      origin: description of the source.
      predicts: 'velocity', or 'noise' if the network can only initialise training.
      fresh: modules that are missing from `params`, to be initialised.
    """

    config: dict[str, Any]
    params: dict[str, Any]
    step: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    origin: str
    predicts: str = 'velocity'
    fresh: tuple[str, ...] = ()


def exists(folder) -> bool:
    """Whether the folder holds an exported network, complete or not."""
    folder = paths.to_path(folder)
    return any((folder / name).exists() for name in (TENSORS, CONFIG))


def write(folder, network: ExportedNetwork, model: sit.SiT) -> None:
    """Writes both files.

    Args:
      folder: created if missing.
      network: see `ExportedNetwork`.
      model: the network that `network.config` describes.

    Raises:
      ValueError: the folder is that of a run, or the parameters do not fit the model.
    """
    folder = paths.to_path(folder)
    if (folder / 'run.json').exists():
        raise ValueError(f'{folder} holds a run; give another folder to write to')
    check_params(network, model, folder)
    content = {
        'config': network.config,
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
    metadata = {
        'format': FORMAT,
        'version': VERSION,
        'config_sha256': hashlib.sha256(text).hexdigest(),
        'tensors_sha256': _digest(tensors),
    }
    files.write_bytes(folder / TENSORS, safetensors.numpy.save(tensors, metadata))
    files.write_bytes(folder / CONFIG, text)


def read(folder) -> ExportedNetwork:
    """Reads what `write` wrote; `check_params` compares it with a model.

    Raises:
      ValueError: a file is missing, damaged or edited, or has another format or
        version.
    """
    folder = paths.to_path(folder)
    missing = [name for name in (TENSORS, CONFIG) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f'{folder} holds no exported network: there is no {missing[0]}; give a '
            'folder that python -m ism_jax.convert wrote'
        )
    tensors, metadata = tensor_file.read_safetensors(folder / TENSORS)
    found = metadata.get('format'), metadata.get('version')
    if found != (FORMAT, VERSION):
        raise ValueError(
            f'{folder / TENSORS} has the format {found[0]!r}, version {found[1]!r}, '
            f'instead of {FORMAT!r}, version {VERSION!r}; use the ism_jax that wrote '
            'it, or convert the checkpoint with python -m ism_jax.convert'
        )
    text = paths.read_bytes(folder / CONFIG)
    digests = {
        CONFIG: (hashlib.sha256(text).hexdigest(), metadata.get('config_sha256')),
        TENSORS: (_digest(tensors), metadata.get('tensors_sha256')),
    }
    for name, (digest, expected) in digests.items():
        if digest != expected:
            raise ValueError(
                f'{folder / name} has changed since the export: it was edited or '
                'damaged, or belongs to another network; export again'
            )
    content = json.loads(text)
    return ExportedNetwork(
        config=content['config'],
        params=traverse_util.unflatten_dict(tensors, sep='/'),
        step=content['step'],
        class_names=tuple(content['class_names']),
        image_shape=tuple(content['image_shape']),
        origin=content['origin'],
        predicts=content['predicts'],
        fresh=tuple(content['fresh']),
    )


def initialised(network: ExportedNetwork, model: sit.SiT) -> dict[str, Any]:
    """All parameters of the model: those of the network, and its fresh modules.

    The fresh modules are always initialised with the same key; training uses its own.
    They have no effect at d = 0, w = 0.
    """

    @jax.jit  # So that the other modules are not computed.
    def make(key):
        params = conditions.init_params(model, network.image_shape, key)
        return {name: params[name] for name in network.fresh}

    return {**network.params, **make(jax.random.key(0))}


def with_classes(
    network: ExportedNetwork, class_names: Sequence[str]
) -> ExportedNetwork:
    """The network adapted to other classes; unchanged if their number is the same.

    Each new class embedding starts as the null embedding, so that the network computes
    its unconditional velocity for every label.
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
    network: ExportedNetwork,
    own_model: conditions.ConditionedNetwork,
    model: conditions.ConditionedNetwork,
    image_shape: tuple[int, int, int],
    folder,
) -> None:
    """Checks that `model` computes the same function with the network's parameters.

    Images may have another size, because positions are not learned. For other classes
    see `with_classes`.

    Args:
      network: parameters to start from.
      own_model: the model that `network.config` describes.
      model: the model to be trained.
      image_shape: (H, W, C) of the data to be trained on.
      folder: folder of the network, for messages.

    Raises:
      ValueError: an attribute of the model or a parameter differs.
    """
    if type(model) is not type(own_model):
        raise ValueError(
            f'the network in {folder} is a {type(own_model).__name__}, and the model a '
            f'{type(model).__name__}; change the backbone, or start from another one'
        )
    for name in FUNCTION_FIELDS:  # A U-Net has no depth and no mlp_ratio.
        value, expected = (getattr(m, name, None) for m in (model, own_model))
        if value != expected and name not in network.fresh:
            raise ValueError(
                f'{name} = {value!r}, but the network in {folder} has {expected!r}; '
                f'set {name} = {expected!r}, or start from another network'
            )
    check_params(network._replace(image_shape=image_shape), model, folder)


def check_params(network: ExportedNetwork, model: sit.SiT, folder) -> None:
    """Checks that the parameters are those of the model, except for fresh modules.

    Raises:
      ValueError: a parameter is missing, unknown, of the wrong shape or not float32.
    """
    abstract = conditions.abstract_params(model, network.image_shape)
    expected = {n: tree for n, tree in abstract.items() if n not in network.fresh}

    def describe(params):
        return {
            name: f'{tuple(leaf.shape)} {leaf.dtype}'
            for name, leaf in _flatten(params).items()
        }

    tensor_shapes.check(
        describe(network.params),
        describe(expected),
        source=f'the network of {folder}',
        network=f'the model for images of {tuple(network.image_shape)}',
        advice='use a network with the sizes and classes of the model',
    )


def params_digest(params) -> str:
    """SHA-256 of a parameter tree, equal to that of the file that `write` makes."""
    return _digest({name: np.asarray(leaf) for name, leaf in _flatten(params).items()})


def _digest(tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of arrays with their names, dtypes and shapes, hexadecimal."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        content.update(f'{name} {array.dtype} {array.shape}\n'.encode())
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def _flatten(params) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep='/')
