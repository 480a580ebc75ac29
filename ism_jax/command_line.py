"""How the commands end: a bad input is one line and code 2, not a traceback."""

from collections.abc import Callable, Sequence
import sys

from absl import logging


def main(run: Callable[[], None], *expected: type[Exception]):
    """A main function for `absl.app.run`.

    Args:
      run: does the work; reads its flags itself.
      *expected: kinds of error that are told in one line, besides ValueError.
    """

    def wrapped(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            if argv[1:]:
                raise ValueError(f'{argv[1]!r} is no flag; --help lists the flags')
            run()
        except (ValueError, *expected) as error:
            print(f'error: {error}', file=sys.stderr)
            sys.exit(2)

    return wrapped
