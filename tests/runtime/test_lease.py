"""One run per folder of a bucket."""

import concurrent.futures
import time

import pytest

from ism_jax.runtime import lease, lock, paths


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, 'RENEW_SECONDS', 0.2)


def _lease(folder, pid=7):
    return lease.Lease(folder, {'pid': pid, 'host': 'there', 'since': 'noon'})


def _abandon(held):
    """Ends as a killed process does: without removing the object."""
    held._ended.set()
    held._thread.join()


def test_a_folder_of_a_bucket_has_a_lease(folder, tmp_path):
    with lock.for_folder(folder) as held:
        assert isinstance(held, lease.Lease) and (folder / lease.NAME).exists()
    assert not (folder / lease.NAME).exists()
    assert isinstance(lock.for_folder(tmp_path), lock.Lock)


def test_a_second_run_is_refused_while_the_first_renews(folder):
    with _lease(folder):
        with pytest.raises(ValueError, match='used by another run .process 7 on there'):
            _lease(folder).__enter__()
        time.sleep(0.5)  # The refused run left the lease to the first.
        assert b'"pid": 7' in (folder / lease.NAME).read_bytes()
    with _lease(folder):
        pass


def test_an_abandoned_lease_is_taken_over(folder, capsys):
    held = _lease(folder).__enter__()
    _abandon(held)
    started = time.monotonic()
    with _lease(folder, pid=8):
        assert time.monotonic() - started > lease.MISSED * lease.RENEW_SECONDS
        assert b'"pid": 8' in (folder / lease.NAME).read_bytes()
    assert 'waiting' in capsys.readouterr().err


def test_one_of_many_wins(folder):
    """Of runs that start at once, also on an abandoned lease."""

    def enter(number):
        try:
            return _lease(folder, number).__enter__()
        except ValueError as error:
            assert 'is used by another run' in str(error)

    for _ in range(2):
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            (held,) = filter(None, pool.map(enter, range(6)))
        _abandon(held)


def test_a_run_that_lost_its_lease_ends(folder, monkeypatch, capsys):
    ended = []

    def end(code):
        ended.append(code)
        held._ended.set()

    monkeypatch.setattr(lease.os, '_exit', end)
    with _lease(folder) as held:
        (folder / lease.NAME).write_text('{}')  # By one that took over.
        held._thread.join(10)
    assert ended == [1]
    assert 'another run took over' in capsys.readouterr().err
    # The object of the other run stays.
    assert held._generation != 0


@pytest.mark.parametrize('answer', [503, 429, 'cut'])
def test_a_service_that_fails_for_a_while_is_asked_again(answer, folder, storage):
    with storage.fault(answer, method='POST', times=1) as hits:
        with _lease(folder):
            pass
    assert hits


def test_an_answer_that_is_lost_does_not_lose_the_lease(folder, storage):
    """The first attempt wrote the object, the second finds it."""
    with storage.fault('lose', method='POST', path='upload', times=1) as hits:
        with _lease(folder):
            pass
    assert hits and not (folder / lease.NAME).exists()


def test_denied_permission_is_named(folder, storage):
    with storage.fault(403, method='POST'):
        with pytest.raises(ValueError, match='cannot be written to .*injected.*right'):
            _lease(folder).__enter__()


def test_a_missing_bucket_is_named(storage):
    with pytest.raises(ValueError, match='there is no bucket gs://missing'):
        paths.from_user('gs://missing/run', '--workdir')
