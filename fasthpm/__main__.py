"""`fasthpm COMMAND …`, the same as `python -m fasthpm COMMAND …`."""

import importlib
import sys
from collections.abc import Sequence

from fasthpm import __version__
from fasthpm.cli import run_rank
from fasthpm.entry import COMMANDS, FUNCTIONS
from fasthpm.errors import UserError, nearest


def dispatch(argv: Sequence[str] | None) -> None:
    """Run the command that the first argument names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"fasthpm {__version__}")
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: fasthpm COMMAND [flags]\n\n"
            + "\n".join(f"  {k:10} {v[1]}" for k, v in COMMANDS.items())
            + "\n\nfasthpm COMMAND --help explains each; fasthpm --version\n"
            + f"from Python, with the flags as keywords: fasthpm.{', '.join(FUNCTIONS)}"
        )
        return
    if arguments[0] not in COMMANDS:
        raise UserError(
            f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}; expected one of {', '.join(COMMANDS)}"
        )
    importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])


def main() -> None:
    """Entry point of the `fasthpm` script."""
    run_rank(dispatch)  # most commands may be one rank of several


if __name__ == "__main__":
    main()
