"""`--profile`: the trace of a run's steps, read back."""

import jax
import pytest

from ism_jax.training import profiler


@pytest.mark.parametrize('text', ['5', '3:3', '4:2', '-1:2', '2:9', 'a:b', '1:2:3'])
def test_bad_ranges_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match=f'--profile {text} must be FROM:TO.* <= 8'):
        profiler.Profiler(tmp_path, text, 8)


def _steps(folder):
    """The numbers of the steps in the trace below a folder."""
    (path,) = folder.glob('plugins/profile/*/*.xplane.pb')
    return sorted(
        dict(event.stats)['step_num']
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == profiler.STEP_NAME
    )


def test_an_interrupted_trace_is_written(tmp_path):
    tracer = profiler.Profiler(tmp_path, '1:8', 9)
    for number in range(3):
        with tracer.step(number):
            pass
        tracer.stop_after(number, ())
    assert not list(tmp_path.iterdir())
    tracer.close()
    tracer.close()
    assert _steps(tmp_path) == [1, 2]


def test_a_run_traces_the_steps_of_the_flag(small_run):
    assert _steps(small_run / 'profile') == [2, 3]
