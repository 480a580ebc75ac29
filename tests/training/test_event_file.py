"""Event files, read back by TensorBoard."""

import io

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from ism_jax.runtime import bucket_file, paths
from ism_jax.training import event_file


def test_tensorboard_reads_what_was_written(tmp_path):
    events = event_file.EventFile(tmp_path)
    config = {'model.depth': 3, 'model.dtype': 'bfloat16', 'steps': (1, 4)}
    events.settings(config, '0123abcd')
    events.scalars(5, {'loss': 0.5, 'velocity/loss': 0.25})
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    events.picture(6, 'samples', picture)
    events.scalars(10, {'loss': 0.125})
    # Not closed: what a killed run has written is there.
    read = event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
    read.Reload()
    losses = [(e.step, e.tensor_proto.float_val[0]) for e in read.Tensors('loss')]
    assert losses == [(5, 0.5), (10, 0.125)]
    (event,) = read.Images('samples')
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert event.step == 6 and (event.width, event.height) == (4, 4)
    np.testing.assert_array_equal(shown, picture)
    content = read.SummaryMetadata('_hparams_/session_start_info').plugin_data.content
    for part in (b'model.depth', b'bfloat16', b'(1, 4)', b'0123abcd'):
        assert part in content
    events.close()


def test_tensorboard_reads_what_was_written_to_a_bucket(
    folder, storage, tmp_path, monkeypatch
):
    """Several files; what could not be written at once is written later."""
    monkeypatch.setattr(bucket_file, 'MAX_UPLOAD', 1000)
    monkeypatch.setattr(paths, 'put', fail_at(paths.put, {7, 12}))
    events = event_file.EventFile(folder)
    for step in range(40):
        try:
            events.scalars(step, {'loss': float(step)})
        except OSError:
            assert step < 39
    # Not closed: what a killed run has written is there.
    folder = folder / 'tensorboard'
    names = list(paths.files_below(folder))
    assert len(names) >= 3
    for name in names:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    read = event_accumulator.EventAccumulator(str(tmp_path), {'tensors': 0})
    read.Reload()
    losses = [e.tensor_proto.float_val[0] for e in read.Tensors('loss')]
    assert losses == list(range(40))


def fail_at(function, calls):
    """`function`, which fails at some calls, numbered from 0."""
    number = iter(range(1000))

    def call(*arguments):
        if next(number) in calls:
            raise OSError('unavailable')
        return function(*arguments)

    return call
