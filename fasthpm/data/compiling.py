"""Loops that numba compiles: once for an installation where a folder can be written, and not in silence."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numba

from fasthpm.errors import note_once

SLOW_SECONDS = 3.0  # from numba's cache a loop comes sooner
TOLD = "compiling the loader's loop for this machine, once for an installation: half a minute or more"


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A block that compiles; if that lasts, the user is told why nothing else happens."""
    timer = threading.Timer(SLOW_SECONDS, note_once, [TOLD])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def compiled(loop: Callable[..., Any], signature: Any = None) -> Any:
    """`loop` as machine code that runs without the GIL; compiled now if it has a signature, else when it is called.

    numba keeps it beside the loop's file, else in the user's cache folder; where neither can be written, every process
    compiles for itself.
    """
    given = () if signature is None else (signature,)
    with told():
        try:
            return numba.njit(*given, nogil=True, cache=True)(loop)
        except RuntimeError as error:
            if "cache" not in str(error):
                raise
            return numba.njit(*given, nogil=True)(loop)
