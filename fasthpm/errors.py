"""The one exception that means "the input is wrong", as opposed to "the code is wrong"; and warnings."""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

NAMED = 3  # pairs of names that differ, in one message


class UserError(Exception):
    """A wrong input. The message is one line: the value, what was expected, what to do.

    Commands print it without a traceback and exit with status 2; everything else keeps its traceback.
    """

    printed_elsewhere = False  # whether another rank prints this one


class AgreedError(UserError):
    """A `UserError` that every rank raises; only rank 0 prints it."""

    def __init__(self, message: str, *, printed_elsewhere: bool) -> None:
        super().__init__(message)
        self.printed_elsewhere = printed_elsewhere


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def unlike(one: str, theirs: Sequence[str], other: str, ours: Sequence[str]) -> str:
    """In what the classes of `one` and those of `other`, which are different, differ: their number, or the first."""
    if len(theirs) != len(ours):
        return f"{one} has {len(theirs)} class{'' if len(theirs) == 1 else 'es'}, {other} has {len(ours)}"
    pairs = [pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1]]
    named = [", ".join(repr(pair[side]) for pair in pairs[:NAMED]) for side in (0, 1)]
    more = f" (and {len(pairs) - NAMED} more differ)" if len(pairs) > NAMED else ""
    return f"{one} has {named[0]} among its classes where {other} has {named[1]}{more}"


_noted: set[str] = set()


def note_once(line: str) -> None:
    """Something that a user should know, on stderr of the first rank, once in a process."""
    if line not in _noted and os.environ.get("RANK", "0") == "0":
        tqdm.write(f"note: {line}", file=sys.stderr)
    _noted.add(line)


def warn(line: str) -> None:
    """A warning on stderr; a progress bar there stays whole."""
    tqdm.write(f"warning: {line}", file=sys.stderr)


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Begin the message of a `UserError` with the file that it is about, once."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from error
