"""Weights of small official networks, and the outputs of the official code for them.

`fixtures/official_networks.json` holds the outputs (see its `about`); the weights are
drawn here from a seed.
"""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from ism_jax.models import conditions, sit

FIXTURE = Path(__file__).parent / 'fixtures' / 'official_networks.json'

# Sizes of the small networks, and their inputs.
WIDTH, DEPTH, HEADS, PATCH, CLASSES = 48, 2, 3, 2, 5
SIDE, CHANNELS = 6, 3
BASE_STEPS = 128
TIMES = (0.03, 0.4, 0.77, 0.9)
TIMESTEPS = (1, 250, 630, 999)
LEVELS = (7, 0, 3, 10)
LABELS = (0, 4, 5, 2)  # 5 is the null label.


def torch_shapes(
    *, width=WIDTH, depth=DEPTH, patch=PATCH, classes=CLASSES, side=SIDE,
    channels=CHANNELS, outputs=2 * CHANNELS, mlp=4 * WIDTH,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Shapes in the state dict of a SiT or DiT."""
    shapes = {
        'pos_embed': (1, (side // patch) ** 2, width),
        'x_embedder.proj.weight': (width, channels, patch, patch),
        'x_embedder.proj.bias': (width,),
        't_embedder.mlp.0.weight': (width, 256),
        't_embedder.mlp.0.bias': (width,),
        't_embedder.mlp.2.weight': (width, width),
        't_embedder.mlp.2.bias': (width,),
        'y_embedder.embedding_table.weight': (classes + 1, width),
    }
    for i in range(depth):
        for name, to, of in (
            ('attn.qkv', 3 * width, width),
            ('attn.proj', width, width),
            ('mlp.fc1', mlp, width),
            ('mlp.fc2', width, mlp),
            ('adaLN_modulation.1', 6 * width, width),
        ):
            shapes[f'blocks.{i}.{name}.weight'] = (to, of)
            shapes[f'blocks.{i}.{name}.bias'] = (to,)
    return shapes | {
        'final_layer.linear.weight': (patch**2 * outputs, width),
        'final_layer.linear.bias': (patch**2 * outputs,),
        'final_layer.adaLN_modulation.1.weight': (2 * width, width),
        'final_layer.adaLN_modulation.1.bias': (2 * width,),
    }


def flax_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of shortcut-models."""

    def dense(name, of, to):
        return {f'{name}/kernel': (of, to), f'{name}/bias': (to,)}

    shapes = {
        'PatchEmbed_0/Conv_0/kernel': (PATCH, PATCH, CHANNELS, WIDTH),
        'PatchEmbed_0/Conv_0/bias': (WIDTH,),
        'LabelEmbedder_0/Embed_0/embedding': (CLASSES + 1, WIDTH),
        'Embed_0/embedding': (256, 1),
        **dense('TimestepEmbedder_0/Dense_0', 256, WIDTH),
        **dense('TimestepEmbedder_0/Dense_1', WIDTH, WIDTH),
        **dense('TimestepEmbedder_1/Dense_0', 256, WIDTH),
        **dense('TimestepEmbedder_1/Dense_1', WIDTH, WIDTH),
        **dense('FinalLayer_0/Dense_0', WIDTH, 2 * WIDTH),
        **dense('FinalLayer_0/Dense_1', WIDTH, PATCH**2 * CHANNELS),
    }
    for i in range(DEPTH):
        block = f'DiTBlock_{i}'
        shapes |= dense(f'{block}/Dense_0', WIDTH, 6 * WIDTH)
        for part in range(1, 5):
            shapes |= dense(f'{block}/Dense_{part}', WIDTH, WIDTH)
        shapes |= dense(f'{block}/MlpBlock_0/Dense_0', WIDTH, 4 * WIDTH)
        shapes |= dense(f'{block}/MlpBlock_0/Dense_1', 4 * WIDTH, WIDTH)
    return shapes


def random_tensors(shapes, seed: int) -> dict[str, np.ndarray]:
    """Weights of scale 1 / sqrt(inputs), and biases large enough to matter."""
    # NumPy guarantees that these draws never change.
    rng = np.random.RandomState(seed)
    tensors = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name == 'pos_embed':
            side = round(shape[1] ** 0.5)
            tensors[name] = sit.position_embedding(shape[2], side)[None]
            continue
        axes = shape[1:] if name.endswith('.weight') else shape[:-1]
        scale = 0.2 if len(shape) == 1 else 1 / np.sqrt(np.prod(axes))
        if 'embedding' in name:
            scale = 0.5
        tensors[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return tensors


def fixture_images() -> np.ndarray:
    """Inputs of the networks, [4, SIDE, SIDE, CHANNELS]."""
    shape = (len(TIMES), SIDE, SIDE, CHANNELS)
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


SIT, DIT, SHORTCUT = (
    random_tensors(shapes, seed)
    for seed, shapes in enumerate((torch_shapes(), torch_shapes(), flax_shapes()), 1)
)


def official_output(kind) -> np.ndarray:
    """Output of the official code: 'sit', 'dit' or 'shortcut'."""
    values = json.loads(FIXTURE.read_text())[kind]
    return np.asarray(values, np.float32).reshape(-1, SIDE, SIDE, CHANNELS)


def assert_official(converted, kind, t, d, w=0.0):
    """Compares a converted network with the official code."""
    key = jax.random.key(0)
    model = sit.SiT(num_classes=converted.num_classes, **converted.model)
    fresh = conditions.init_params(model, converted.image_shape, key)
    params = {**converted.params, **{name: fresh[name] for name in converted.fresh}}
    times, sizes, scales = (
        np.full(len(LABELS), value, np.float32) for value in (t, d, w)
    )
    ours = model.apply(
        {'params': params}, fixture_images(), times, sizes, scales, np.asarray(LABELS)
    )
    theirs = official_output(kind)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f'largest error relative to the largest value: {error:.2e}')
    assert error < 2e-5


def save(path, tensors, metadata=None):
    """Writes a safetensors file and returns its path."""
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    return path
