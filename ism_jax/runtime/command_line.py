"""How the commands end: an expected error is one line, not a traceback.

Exit codes: 0 when all is done, 2 for bad input, 1 for other expected errors, 75 when a
signal asked to stop and everything is saved (the same command goes on), 130 when it was
Ctrl-C.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
import sys

from absl import logging
import jax

from ism_jax.runtime import distributed, preemption


def main(run: Callable[[], None], *expected: type[Exception]):
    """A main function for `absl.app.run`.

    Args:
      run: does the work; reads its flags itself.
      *expected: kinds of error that are told in one line, besides ValueError and
        `preemption.Preempted`.
    """

    def wrapped(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            if argv[1:]:
                raise ValueError(f'{argv[1]!r} is no flag; --help lists the flags')
            run()
        except preemption.Preempted as error:
            print(error, file=sys.stderr)
            distributed.leave(error.exit_code)
        except (ValueError, *expected) as error:
            several = jax.distributed.is_initialized()
            # JAX says ValueError too where it has lost another process.
            if several and not distributed.is_told_by(error, Path(__file__).parents[1]):
                distributed.fail(error)
            print(f'error: {error}', file=sys.stderr)
            distributed.leave(2 if isinstance(error, ValueError) else 1)
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            distributed.fail(error)

    return wrapped


def parse_numbers(text: str, kind) -> tuple:
    """Numbers of '1,2,4'.

    Raises:
      ValueError: something that is no number of the kind.
    """
    try:
        return tuple(kind(part) for part in parse_list(text))
    except ValueError as error:
        raise ValueError(
            f'{text!r} is not a list of numbers such as 1,2,4 ({error})'
        ) from error


def parse_list(text: str) -> list[str]:
    """Words of 'a,b,c'."""
    return [part.strip() for part in text.split(',') if part.strip()]
