"""Whether somebody's weights fit a module: all of them, or an error that lists what does not."""

from collections.abc import Mapping

import torch
from torch import Tensor

LISTED = 8  # keys that an error message spells out


def misfits(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What is wrong with weights `given` for a module whose own are `own`: missing and unexpected keys, wrong shapes,
    values that are not finite; empty if nothing is."""
    problems = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "wrong shape": [
            f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
            for key in given
            if key in own and given[key].shape != own[key].shape
        ],
        "not finite": [key for key, value in given.items() if not bool(torch.isfinite(value).all())],
    }
    return "; ".join(f"{len(keys)} {name}: {listed(keys)}" for name, keys in problems.items() if keys)


def listed(keys: list[str]) -> str:
    """The first keys, and how many more there are."""
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more
