"""Commands on pages of the documentation."""

import importlib
from collections.abc import Sequence
from typing import Any

from fasthpm.__main__ import dispatch

LAUNCHERS = {"deepspeed": "--module", "torchrun": "-m", "mpirun": "-m", "srun": "-m", "python": "-m"}


def entry_point(words: Sequence[str]) -> tuple[Any, list[str]]:
    """The main function that a command line reaches, and the arguments that it gets."""
    if words[0] == "fasthpm":
        return dispatch, list(words[1:])
    place = words.index(LAUNCHERS[words[0]]) + 1
    return importlib.import_module(words[place]).main, list(words[place + 1 :])
