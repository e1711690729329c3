"""What every command line of the project shares: strict parsing, one-line errors, exit codes."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from fasthpm.errors import UserError, nearest

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
LINGER = 3.0  # seconds: a launcher kills all ranks as soon as one has left, and one of them may not have printed yet


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError`, never abbreviates, and names the nearest flag to an unknown one."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]

    def parse_args(self, args: Sequence[str] | None = None, namespace: object = None) -> argparse.Namespace:  # type: ignore[override]
        values, unknown = self.parse_known_args(args)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].split("=")[0]
            raise UserError(f"unknown argument {word!r}{nearest(word, flags)}; {self.prog} --help lists them all")
        return values

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_rank(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
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


def run_command(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main`, turn a `UserError` into one line on stderr and status 2, Ctrl-C into status 130."""
    try:
        main(argv)
    except UserError as error:
        if error.printed_elsewhere:
            time.sleep(LINGER)
        else:
            print(f"fasthpm: error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("fasthpm: interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)
