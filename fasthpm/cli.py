"""What every command line of the project shares: strict parsing, one-line errors, exit codes."""

import argparse
import contextlib
import errno
import io
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO, cast

from fasthpm.errors import UserError, nearest

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
Arguments = Sequence[str] | Mapping[str, Any] | None  # a command line, keywords from Python, or the process's own line
LINGER = 3.0  # seconds: a launcher kills all ranks as soon as one has left, and one of them may not have printed yet


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError`, never abbreviates, and names the nearest flag to an unknown one."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]
        self.register("type", float, finite)  # of all flags whose type is float, also of groups

    def parse_args(self, args: Arguments = None, namespace: object = None) -> argparse.Namespace:  # type: ignore[override]
        values, unknown = self.parse_known_args(self._spelled_out(args) if isinstance(args, Mapping) else args)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].split("=")[0]
            raise UserError(f"unknown argument {word!r}{nearest(word, flags)}; {self.prog} --help lists them all")
        return values

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def _spelled_out(self, keywords: Mapping[str, Any]) -> list[str]:
        """The command line that says the same as `keywords`; those that are None are left out."""
        known = {action.dest: action for action in self._actions if action.help != argparse.SUPPRESS}
        known.pop("help", None)
        for name in keywords:
            if name not in known:
                raise UserError(f"unknown argument {name!r}{nearest(name, known)}; {self.prog} --help lists them all")
        given = [(known[name], value) for name, value in keywords.items() if value is not None]
        given.sort(key=lambda pair: bool(pair[0].option_strings))  # a list of values would swallow what stands alone
        return [word for action, value in given for word in _words(action, value)]


def finite(text: str) -> float:
    """A number of a command line; neither nan nor inf, which no flag means."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no number that can be meant, expected a finite one")
    return value


def _words(action: argparse.Action, value: Any) -> list[str]:
    """An argument and its value as they stand on a command line."""
    flag = next((option for option in action.option_strings if option.startswith("--")), "")
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise UserError(f"{action.dest} is {value!r}, expected True or False")
        negated = [option for option in action.option_strings if option.startswith("--no-")]
        return [flag] if value else negated[-1:]
    several = isinstance(value, list | tuple)
    if action.nargs is not None:
        return [flag, *map(str, value if several else [value])]
    if several:
        raise UserError(f"{action.dest} is {value!r}, expected one value")
    return [f"{flag}={value}" if flag else str(value)]


class Patient:
    """A text stream whose reader may leave (`… | head -1`): what comes after that is dropped, and the work goes on.

    What the reader's encoding cannot show is written with backslashes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):  # not one of someone else's making
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """As a file's."""
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        """As a file's."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # so that Python's own flush at the end goes well, too
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def heard_or_not() -> Iterator[None]:
    """Let standard output and the error output be `Patient`."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and cast(TextIO, Patient(stream)) for stream in streams)
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = streams


def run_rank(main: Callable[[Sequence[str] | None], object]) -> NoReturn:
    """`run_command` for one rank of several: it leaves without tearing Python and its libraries down.

    By then all files are closed and the ranks have parted; threads of communication libraries that are still about
    must not turn a good end into an abort.
    """
    status = 1
    try:
        run_command(main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_command(main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main`, turn a `UserError` into one line on stderr and status 2, Ctrl-C into status 130.

    Names of files that the user has no rights to, or that no file can have, are wrong inputs, too.
    """
    with heard_or_not():
        status = _status_of(main, argv)
    sys.exit(status)


def _status_of(main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None) -> int:
    try:
        main(argv)
    except UserError as error:
        if error.printed_elsewhere:
            time.sleep(LINGER)
        else:
            print(f"fasthpm: error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except OSError as error:
        if error.filename is None or error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP):
            raise
        remedy = "give yourself the rights, or choose" if isinstance(error, PermissionError) else "choose"
        line = f"{error.filename} cannot be used ({error.strerror}); {remedy} another"
        print(f"fasthpm: error: {line}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("fasthpm: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    return 0
