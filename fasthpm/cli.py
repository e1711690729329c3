"""What every command line of the project shares: strict parsing, one-line errors, exit codes."""

import argparse
import contextlib
import errno
import io
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType, MappingProxyType
from typing import Any, NoReturn, TextIO, cast

from fasthpm import entry
from fasthpm.entry import EXIT_INTERRUPTED
from fasthpm.errors import UserError, nearest

EXIT_USER_ERROR = 2
Arguments = Sequence[str] | Mapping[str, Any] | None  # a command line, keywords from Python, or the process's own line
OWNERS: dict[str, str] = {}  # flags that shared code may name, and the command that has them; `recipe` adds its own
_line: ContextVar[Mapping[str, Any]] = ContextVar("_line", default=MappingProxyType({}))  # flags and values parsed last
_given: ContextVar[frozenset[str]] = ContextVar("_given", default=frozenset())  # those that stood on that line
LINGER = 3.0  # seconds: a launcher kills all ranks as soon as one has left, and one of them may not have printed yet


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError`, never abbreviates, and names the nearest flag to an unknown one."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]

    def parse_args(self, args: Arguments = None, namespace: object = None) -> argparse.Namespace:  # type: ignore[override]
        line = self._spelled_out(args) if isinstance(args, Mapping) else sys.argv[1:] if args is None else list(args)
        values, unknown = self.parse_known_args(line)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].split("=")[0]
            raise UserError(f"unknown argument {word!r}{nearest(word, flags)}; {self.prog} --help lists them all")
        self._check_finite(values)
        _line.set(
            {flag: getattr(values, action.dest, None) for action in self._actions for flag in action.option_strings}
        )
        _given.set(frozenset(word.split("=")[0] for word in line if word.startswith("--")))
        return values

    def _check_finite(self, values: argparse.Namespace) -> None:
        """Refuse nan and infinity, which float() reads, for any flag."""
        for action in self._actions:
            value = getattr(values, action.dest, None)
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, float) and not math.isfinite(one) and value != action.default:
                    raise UserError(f"{action.dest} is {one}, expected a finite number; see {self.prog} --help")

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


def without_effect(flags: Iterable[str], because: str, given: Container[str] | None = None) -> None:
    """A flag that was given and would be passed over in silence is refused.

    - `flags`: names without dashes that have no effect here; `because`: what makes them idle, for the user to read
    - `given`: the names that were given; None: those on the command line parsed last, which only a command's own `main`
      may ask about

    **Raises:** `UserError` that names the first of them.
    """
    for name in flags:
        if f"--{name}" in _given.get() if given is None else name in given:
            raise UserError(f"--{name} has no effect here: {because}; leave it out")


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


def fitting(message: str) -> str:
    """An error of code that several commands share, so that it advises the command that runs: its own flag where that
    gave the value in question, and where it has no such flag the command that has.
    """
    flags = _line.get()

    def fit(found: re.Match[str]) -> str:
        flag = found[0]
        if not flags or flag in flags or flag not in OWNERS or message[: found.start()].endswith(f"{OWNERS[flag]} "):
            return flag
        ours = [name for name, value in flags.items() if name.endswith("_path") and value and str(value) in message]
        return ours[0] if flag == "--data_path" and ours else f"{OWNERS[flag]} {flag}"

    return re.sub(r"--[a-z][a-z_0-9]+", fit, message)


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
    """Run `main`; a `UserError` is one line on stderr and status 2, Ctrl-C one line and status 130.

    Names of files that the user has no rights to, or that no file can have, are wrong inputs, too.
    """
    with _Interrupts() as interrupts, heard_or_not():
        status = _status_of(main, argv, interrupts)
    sys.exit(status)


def _status_of(
    main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None, interrupts: "_Interrupts"
) -> int:
    try:
        main(argv)
    except (KeyboardInterrupt, Exception) as error:
        if interrupts.came or isinstance(error, KeyboardInterrupt):
            print("fasthpm: interrupted", file=sys.stderr, flush=True)
            return EXIT_INTERRUPTED
        line = fitting(str(error)) if isinstance(error, UserError) else _unusable_name(error)
        if not line:
            raise
        if isinstance(error, UserError) and error.printed_elsewhere:
            time.sleep(LINGER)
        else:
            print(f"fasthpm: error: {line}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return 0


def _unusable_name(error: BaseException) -> str:
    """What to say of a file that the user has no rights to, or whose name no file can have; empty for other errors."""
    names = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
    if not isinstance(error, OSError) or error.filename is None or error.errno not in names:
        return ""
    remedy = "give yourself the rights, or choose" if isinstance(error, PermissionError) else "choose"
    return f"{error.filename} cannot be used ({error.strerror}); {remedy} another"


class _Interrupts:
    """Remembers Ctrl-C while it is open: native code that it meets, or an import, may turn it into any other error.

    A second Ctrl-C, and one that lands where no exception can be raised (a finaliser, a callback), end at once.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: list[Any] = []

    def __enter__(self) -> "_Interrupts":
        known = (signal.default_int_handler, entry.leave)
        here = threading.current_thread() is threading.main_thread()
        if here and signal.getsignal(signal.SIGINT) in known:
            self._before = [signal.signal(signal.SIGINT, self._receive), sys.unraisablehook]
            sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            handler, sys.unraisablehook = self._before
            signal.signal(signal.SIGINT, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            entry.leave()
        self.came = True
        raise KeyboardInterrupt

    def _unraisable(self, lost: Any) -> None:
        if self.came:
            entry.leave()
        self._before[1](lost)
