"""Starts and ends the commands: bad input prints one line and exits with 2.

Exit codes: 0 for success, 2 for bad input, 1 for other expected errors, 75 if a signal
requested a stop and everything is saved (the same command resumes), 130 if the signal
was Ctrl-C.
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
from pathlib import Path
import re
import sys
import traceback

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from ism_jax.runtime import distributed, preemption

_HELP = ('--help', '-help', '--helpshort', '--helpfull', '-h', '-?')


def run(
    main: Callable[..., None],
    *expected: type[Exception],
    topics: Mapping[str, Callable[[], str]] | None = None,
    commands: Sequence[str] = (),
) -> None:
    """Parses the flags, runs a command and ends the process.

    Args:
      main: the command, which reads its flags itself; it takes the subcommand if there
        are `commands`.
      *expected: errors that are printed in one line, in addition to ValueError and
        `preemption.Preempted`.
      topics: what `--help=TOPIC` prints, by topic.
      commands: subcommands; the first argument must be one of them. Including '' makes
        it optional.
    """
    topics = topics or {}

    def parse(argv: Sequence[str]) -> list[str]:
        asked = [a.partition('=')[2] for a in argv if a.startswith('--help=')]
        if set(_HELP) & set(argv) or (asked and asked[0] not in topics):
            _print_help(topics)
            sys.exit(0)
        arguments = [a for a in argv if not a.startswith('--help=')]
        rest = _parse(_with_config_paths(arguments))
        if asked:
            print(topics[asked[0]]())
            sys.exit(0)
        return rest

    app.run(guard(main, *expected, commands=commands), flags_parser=parse)


def guard(
    main: Callable[..., None], *expected: type[Exception], commands: Sequence[str] = ()
) -> Callable[[Sequence[str]], None]:
    """`main` as a function of argv; prints expected errors in one line, see `run`."""

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            arguments, chosen = list(argv[1:]), []
            if commands:
                given = arguments[:1]
                chosen = given if given and given[0] in commands else ['']
                arguments = arguments[1:] if chosen == given else arguments
                if chosen[0] not in commands:
                    names = ', '.join(filter(None, commands))
                    raise ValueError(
                        f'give one of the commands {names}; --help shows examples'
                    )
            if arguments:
                raise ValueError(f'{arguments[0]!r} is not a flag; see --help')
            main(*chosen)
        except preemption.Preempted as error:
            print(error, file=sys.stderr)
            distributed.leave(error.exit_code)
        except (ValueError, *expected) as error:
            # JAX also raises ValueError when it loses another process.
            package = Path(__file__).parents[1]
            several = jax.distributed.is_initialized()
            if several and not distributed.is_raised_by(error, package):
                distributed.fail(error)
            print(f'error: {error}', file=sys.stderr)
            distributed.leave(2 if isinstance(error, ValueError) else 1)
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            distributed.fail(error)

    return guarded


def _config_path(name: str) -> str:
    """The path of a config file; a bare name such as 'quickstart' is one of ours.

    Args:
      name: path or bare name, in each case with `:ARGUMENT` or without.
    """
    bare, colon, argument = name.partition(':')
    if not re.fullmatch(r'\w+', bare):
        return name
    package = Path(__file__).parents[1]
    # Installed from a wheel, or in a checkout.
    for folder in (package / 'configs', package.parent / 'configs'):
        if (path := folder / f'{bare}.py').is_file():
            return f'{path}{colon}{argument}'
    return name


def _with_config_paths(argv: Sequence[str]) -> list[str]:
    """The arguments with `_config_path` applied to --config."""
    replaced = list(argv[:1])
    for before, argument in itertools.pairwise(argv):
        flag, equals, value = argument.partition('=')
        if before == '--config':
            argument = _config_path(argument)
        elif flag == '--config' and equals:
            argument = f'--config={_config_path(value)}'
        replaced.append(argument)
    return replaced


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a mistake ends the process with one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        # An unreadable config file raises only when it is used.
        hasattr(getattr(flags.FLAGS, 'config', None), 'keys')
        return rest
    except (flags.Error, OSError, AttributeError, KeyError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name == 'get_config' for frame in frames):
            raise  # A mistake in the config file.
        print(f'error: {_in_one_line(error, argv)}', file=sys.stderr)
        sys.exit(2)


def _in_one_line(error: Exception, argv: Sequence[str]) -> str:
    text = str(error)
    if isinstance(error, OSError):
        path = flags.FLAGS['config'].config_filename.partition(':')[0]
        reason = 'cannot be read' if Path(path).is_file() else 'does not exist'
        return f'--config {path} {reason}; give one such as configs/quickstart.py'
    if 'whilst parsing config file' in text:  # Followed by a traceback.
        return text.strip().splitlines()[-1].removeprefix('ValueError: ')
    if isinstance(error, (AttributeError, KeyError)):
        name = re.search(r"'(\w+)\\?'", text)[1]
        close = re.search(r'Did you mean "(\w+)"', text)
        flag = [a for a in argv if name in a.partition('=')[0].split('.')]
        return (
            f'{flag[0] if flag else name}: the config has no field {name!r}'
            + (f'; did you mean {close[1]!r}?' if close else '')
            + ' (--help=config lists the fields)'
        )
    return ' '.join(text.split())


def _print_help(topics: Mapping[str, Callable[[], str]]) -> None:
    print((sys.modules['__main__'].__doc__ or '').strip())
    print('\nflags:\n' + flags.FLAGS.main_module_help().partition('\n')[2])
    if others := flags.FLAGS.module_help(distributed.__name__).partition('\n')[2]:
        print('\nflags for several processes:\n' + others)
    for topic in topics:
        print(f'\n--help={topic} prints more.')


def define_config_flag() -> None:
    """The flag `--config`: a config file, whose fields are flags too."""
    text = 'Config file, such as configs/quickstart.py.'
    config_flags.DEFINE_config_file('config', None, text, lock_config=True)


def required_config(config):
    """`FLAGS.config`, which must be given.

    Raises:
      ValueError: it is missing.
    """
    if config is None:
        raise ValueError('--config is missing; give one such as configs/quickstart.py')
    return config


def parse_numbers(text: str, kind) -> tuple:
    """The numbers in '1,2,4'.

    Args:
      text: comma-separated.
      kind: int or float.

    Raises:
      ValueError: an element is not a number of that kind.
    """
    try:
        return tuple(kind(part) for part in parse_list(text))
    except ValueError as error:
        raise ValueError(
            f'{text!r} is not a list of numbers such as 1,2,4 ({error})'
        ) from error


def parse_list(text: str) -> list[str]:
    """The words in 'a,b,c'."""
    return [part.strip() for part in text.split(',') if part.strip()]
