"""A network of ism_jax in PyTorch: one file that needs only torch and safetensors.

    import torch
    import ism_torch

    model = ism_torch.load('weights.safetensors')
    images = ism_torch.sample(model, torch.tensor([3, 7]), steps=4, guidance=1.5)

`python -m ism_jax.convert torch` writes this file and the weights. The network is a SiT
(arXiv 2401.08740), with the tensor names of its official code, plus embeddings of the
step size d and the guidance scale w, and of the guidance interval if the network is
conditioned on it. Time runs from noise at 0 to data at 1.
"""

import json
import math

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F


def scalar_features(x):
    """Sinusoidal features of one scalar per sample, [B] -> [B, 256]."""
    # In float64, because the angles reach 1000.
    exponents = torch.arange(128, dtype=torch.float64) / 128
    angles = x[:, None] * (10_000**-exponents).to(x)
    return torch.cat([angles.cos(), angles.sin()], -1)


class ScalarEmbedding(nn.Module):
    """Two-layer embedding of a scalar, [B] -> [B, width]."""

    def __init__(self, width):
        super().__init__()
        layers = nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)
        self.mlp = nn.Sequential(*layers)

    def forward(self, x):
        return self.mlp(scalar_features(x))


def modulation(width, number):
    """Linear layer from the condition to `number` vectors [B, width] for a block."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, number * width))


def modulated(x, shift, scale):
    """Layer norm of tokens [B, T, width] with shift and scale [B, width]."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Self-attention and MLP, each modulated and gated by the condition."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict(
            dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        )
        self.mlp = nn.ModuleDict(
            dict(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width))
        )
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x, condition):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(
            condition
        ).chunk(6, -1)
        batch, tokens, width = x.shape
        qkv = self.attn['qkv'](modulated(x, shift_a, scale_a))
        qkv = qkv.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv)
        h = h.transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate_a[:, None] * self.attn['proj'](h)
        h = self.mlp['fc1'](modulated(x, shift_m, scale_m))
        h = self.mlp['fc2'](F.gelu(h, approximate='tanh'))
        return x + gate_m[:, None] * h


class Network(nn.Module):
    """Velocity network s(x, t, c, d, w).

    Attributes:
      options: numbers and names that its weights file states.
    """

    def __init__(self, options):
        super().__init__()
        self.options = options
        width, patch = options['hidden_size'], options['patch_size']
        side, _, channels = options['image_shape']
        self.x_embedder = nn.ModuleDict(
            dict(proj=nn.Conv2d(channels, width, patch, stride=patch))
        )
        self.pos_embed = nn.Parameter(torch.empty(1, (side // patch) ** 2, width))
        classes = nn.Embedding(options['num_classes'] + 1, width)
        self.y_embedder = nn.ModuleDict(dict(embedding_table=classes))
        self.t_embedder = ScalarEmbedding(width)
        smooth = options['step_embedding'] == 'size'
        self.step_embedding = (
            ScalarEmbedding(width) if smooth else nn.Embedding(16, width)
        )
        names = ['guidance', *(['start', 'end'] if options['interval_input'] else [])]
        self.guidance_embeddings = nn.ModuleDict(
            {name: ScalarEmbedding(width) for name in names}
        )
        heads, hidden = options['num_heads'], int(options['mlp_ratio'] * width)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden) for _ in range(options['depth'])
        )
        last = nn.Linear(width, patch**2 * channels)
        self.final_layer = nn.ModuleDict(
            dict(linear=last, adaLN_modulation=modulation(width, 2))
        )

    def forward(self, x, t, d, w, label, interval):
        """Velocity [B, C, H, W].

        Args:
          x: [B, C, H, W].
          t, d, w: [B] time, step size and guidance scale.
          label: [B] integers; `num_classes` is the null label.
          interval: [B, 2] start and end time of guidance.
        """
        x = self.x_embedder['proj'](x).flatten(2).transpose(1, 2) + self.pos_embed
        condition = self.condition(t, d, w, label, interval)
        for block in self.blocks:
            x = block(x, condition)
        last = self.final_layer
        x = modulated(x, *last['adaLN_modulation'](condition).chunk(2, -1))
        patch, (side, _, channels) = (
            self.options['patch_size'],
            self.options['image_shape'],
        )
        grid = side // patch
        x = last['linear'](x).reshape(-1, grid, grid, patch, patch, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side, side)

    def condition(self, t, d, w, label, interval):
        """Sum of all embeddings, [B, width]; those of d and w are 0 at 0."""
        scale = self.options['time_scale']
        total = self.t_embedder(t * scale) + self.y_embedder['embedding_table'](label)
        if self.options['step_embedding'] == 'size':
            total = total + d[:, None] * self.step_embedding(d * scale)
        else:  # Row k is for d = 2^-k.
            level = (-torch.log2(torch.where(d > 0, d, 1))).round().long()
            total = total + (d > 0)[:, None] * self.step_embedding(level)
        strength = w / (1 + w) if self.options['guidance_embedding'] == 'ratio' else w
        values = {'guidance': strength, 'start': interval[:, 0], 'end': interval[:, 1]}
        for name, embedding in self.guidance_embeddings.items():
            total = total + strength[:, None] * embedding(10 * values[name])
        return total


def load(path='weights.safetensors'):
    """The network in a file that `python -m ism_jax.convert torch` wrote."""
    with safetensors.safe_open(path, 'pt') as file:
        model = Network(json.loads(file.metadata()['options']))
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return model.eval()


def step_sizes(model, steps):
    """Step sizes that sum to 1: equal, or powers of two if training used only these."""
    if not model.options['dyadic']:
        return [1 / steps] * steps
    coarse = 2 ** int(math.log2(steps))
    halved = steps - coarse
    return [1 / coarse] * (coarse - halved) + [0.5 / coarse] * (2 * halved)


@torch.no_grad()
def sample(model, labels, steps=4, guidance=None, interval=None, noise=None):
    """Draws images [B, C, H, W] in about [-1, 1], or latents, one for each label.

    Args:
      model: from `load`.
      labels: [B] integers; the number of classes is the null label.
      steps: number of network calls, 1 .. `model.options['max_steps']`.
      guidance: guidance scale w; None for 1.5 or the nearest that was trained.
      interval: start and end time of guidance, if the network is conditioned on it.
      noise: [B, C, H, W], standard normal; None to draw it.
    """
    options, labels = model.options, labels.to(model.pos_embed.device)
    low, high = options['guidance_range']
    guidance = min(max(1.5, low), high) if guidance is None else guidance
    if not (low <= guidance <= high and 1 <= steps <= options['max_steps']):
        raise ValueError(
            f'guidance = {guidance} must be in {low} .. {high}, and steps = {steps} in '
            f'1 .. {options["max_steps"]}, as the network was trained'
        )
    side, _, channels = options['image_shape']
    shape = len(labels), channels, side, side
    x = torch.randn(shape) if noise is None else noise
    x, time = x.to(model.pos_embed), 0.0
    fill = lambda value: torch.full((len(labels),), value).to(x)
    w = fill(float(guidance if options['guidance_input'] else 0))
    span = torch.tensor(interval or options['interval']).to(x).expand(len(labels), 2)
    for d in step_sizes(model, steps):
        # The finest dyadic step is the velocity itself, d = 0.
        known = 0.0 if options['dyadic'] and d * options['base_steps'] < 1.5 else d
        x = x + d * model(x, fill(time), fill(known), w, labels, span)
        time += d
    return x
