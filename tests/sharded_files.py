"""Writes images as a folder, as Parquet files and as tar files."""

import io
import tarfile

import pytest


def write_folder(folder, images, names):
    """`images`: (encoded image, label) in the order of their labels."""
    for number, (encoded, label) in enumerate(images):
        path = folder / names[label] / f'{number:03d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    return f'folder:{folder}'


def write_parquet(folder, images, names, sizes):
    """Shards of `sizes` images, as `Dataset.to_parquet` writes them."""
    datasets = pytest.importorskip('datasets', reason='it writes the files')
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(names))
    )
    folder.mkdir(parents=True)
    rest = list(images)
    for number, size in enumerate(sizes):
        rows, rest = rest[:size], rest[size:]
        dataset = datasets.Dataset.from_dict(
            {
                'image': [{'bytes': encoded, 'path': None} for encoded, _ in rows],
                'label': [label for _, label in rows],
            },
            features=features,
        )
        name = f'train-{number:05d}-of-{len(sizes):05d}.parquet'
        dataset.to_parquet(folder / name)
    return f'parquet:{folder}/*.parquet'


def add(tar, name, content):
    """Adds a member to a tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tar(folder, images, sizes):
    """Shards of `sizes` images, as WebDataset has them."""
    folder.mkdir(parents=True)
    rest = list(enumerate(images))
    for shard, size in enumerate(sizes):
        rows, rest = rest[:size], rest[size:]
        with tarfile.open(folder / f'train-{shard:03d}.tar', 'w') as tar:
            for number, (encoded, label) in rows:
                add(tar, f'train/{number:03d}.png', encoded)
                add(tar, f'train/{number:03d}.cls', str(label).encode())
    return f'tar:{folder}/train-{{000..{len(sizes) - 1:03d}}}.tar'
