"""One run per folder of a bucket: an object that its holder renews.

A bucket has no locks, but an object can be written on the condition that its generation
is known, and a write changes the generation. The holder renews the object every few
seconds. Who finds the object waits: if its generation changes, the holder is alive; if
not, the object is replaced on the condition that it is still the same. No clocks are
compared.
"""

import json
import os
import secrets
import sys
import threading
import time

from absl import logging

from ism_jax.runtime import paths

NAME = 'lease.json'
RENEW_SECONDS = 5.0
# Renewals that must be missing before the holder counts as gone.
MISSED = 4
# How long a request is repeated while the service fails.
RETRY_SECONDS = 60.0


class Lease:
    """Holds a folder of a bucket while it is entered.

    A run that loses its lease, because it was cut off and another one took over, ends
    at once: two runs would mix their files.

    Args:
      folder: the URL, gs://.
      holder: description of this process, JSON-able.

    Raises:
      ValueError: on entry, if another run (which the message names) renews the lease,
        or if the folder cannot be written to.
    """

    def __init__(self, folder: paths.Path, holder: dict):
        self._folder = folder
        self._content = json.dumps(holder | {'owner': secrets.token_hex(8)})
        self._generation = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self):
        try:
            generation, content = self._current()
            if generation:
                generation = self._wait_for_its_end(generation, content)
            if not self._write(generation):
                raise ValueError(used_message(self._folder, self._current()[1]))
        except ValueError:
            raise
        except Exception as error:  # Of the client, of HTTP or of the system.
            raise ValueError(
                f'{self._folder} cannot be written to '
                f'({" ".join(str(error).split())}); choose another --workdir, or '
                'ask for the right to write objects there'
            ) from error
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        self._thread.join()
        try:
            self._blob().delete(if_generation_match=self._generation)
        except Exception as error:  # Then the next run waits until it has expired.
            logging.warning('%s/%s cannot be removed: %s', self._folder, NAME, error)

    def _wait_for_its_end(self, generation: int, content: str) -> int:
        """Waits until the lease is removed (returns 0) or expires (its generation).

        Raises:
          ValueError: its holder is alive.
        """
        wait = MISSED * RENEW_SECONDS
        print(
            f'{self._folder} was left, or is used, by another run'
            f'{_described(content)}; waiting {wait:.0f} s for a sign of life',
            file=sys.stderr,
            flush=True,
        )
        end = time.monotonic() + wait
        while time.monotonic() < end:
            time.sleep(RENEW_SECONDS / 2)
            found, content = self._current()
            if not found:
                return 0
            if found != generation:
                raise ValueError(used_message(self._folder, content))
        return generation

    def _current(self) -> tuple[int, str]:
        """Generation and content of the object; (0, '') if there is none."""
        from google.api_core import exceptions

        blob = self._blob()
        try:
            content = blob.download_as_bytes(retry=_retry()).decode()
        except exceptions.NotFound:
            return 0, ''
        return blob.generation, content

    def _write(self, generation: int) -> bool:
        """Writes the object if it still has a generation, 0 for none; whether it had.

        Raises:
          Exception: another failure, of any type.
        """
        from google.api_core import exceptions

        blob = self._blob()
        try:
            blob.upload_from_string(
                self._content,
                'application/json',
                if_generation_match=generation,
                retry=_retry(),
            )
            self._generation = blob.generation
            return True
        except exceptions.PreconditionFailed:
            # An attempt whose answer was lost may have written it.
            self._generation, content = self._current()
            return content == self._content

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                renewed = self._write(self._generation)
            except Exception as error:  # pylint: disable=broad-exception-caught
                logging.warning('%s/%s is not renewed: %s', self._folder, NAME, error)
                continue
            if not renewed:
                print(
                    f'error: another run took over {self._folder}, because this one '
                    'did not reach the bucket for a while; this one ends',
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    def _blob(self):
        # Here, as it is installed with the client of such buckets.
        from google.cloud import storage

        if not hasattr(self, '_client'):
            self._client = storage.Client(project=None)
        bucket, _, prefix = str(self._folder).removeprefix('gs://').partition('/')
        return self._client.bucket(bucket).blob(f'{prefix}/{NAME}'.lstrip('/'))


def used_message(folder, content: str) -> str:
    """Says that another run, described in a lock or a lease, uses a folder."""
    return (
        f'{folder} is used by another run{_described(content)}; wait for it, stop it, '
        'or give another --workdir'
    )


def _described(content: str) -> str:
    """The holder in the content of a lock or a lease; '' if it has none."""
    try:
        about = json.loads(content)
        return f' (process {about["pid"]} on {about["host"]} since {about["since"]})'
    except (ValueError, KeyError, TypeError):
        return ''  # The holder has not written yet.


def _retry():
    from google.cloud.storage import retry

    return retry.DEFAULT_RETRY.with_timeout(RETRY_SECONDS)
