"""Weights of a model of some channels, mostly of photographs, for a model of others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fasthpm.data import read_info
from fasthpm.errors import UserError, nearest
from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe

REPEAT = "repeat"
READS, WRITES = "patch_embed.proj.weight", "decoder_pred."  # [D, C, (t,) P, P]; rows of [P*P*C], weight and bias


def in_channels(given: dict[str, Tensor], donor: HPMViT, recipe: Recipe) -> dict[str, Tensor]:
    """The weights `given` of `donor` for the recipe's channels, as its `init_channels` says.

    What the encoder makes of an image that is the same in all channels stays as it was; so the mean response does.

    **Raises:** `UserError` if nothing is asked for, or what cannot be.
    """
    if not recipe.init_channels:
        raise UserError(
            f"init_from {recipe.init_from} has {donor.in_chans} channels, and channels is {recipe.channels}; use "
            f"--init_channels {REPEAT}, or name the channels that get its red, green and blue, like 4,3,2"
        )
    if recipe.init_channels == REPEAT:
        table = _repeated(donor.in_chans, recipe.channels)
    else:
        if donor.in_chans != 3:
            raise UserError(
                f"init_channels is {recipe.init_channels}, and init_from {recipe.init_from} has {donor.in_chans} "
                f"channels, not red, green and blue; use --init_channels {REPEAT}"
            )
        table = _named(places(recipe.init_channels, recipe.channels, _bands(recipe)), recipe.channels)
    reads, writes = table / table.sum(0, keepdim=True), table / table.sum(1, keepdim=True)
    if recipe.init_channels != REPEAT:
        reads = writes * (donor.in_chans / recipe.channels)
    made = dict(given)
    made[READS] = torch.einsum("nc,dc...->dn...", reads.to(given[READS].dtype), given[READS])
    if not donor.objective.width:  # it reconstructs pixels
        for name in (f"{WRITES}weight", f"{WRITES}bias"):
            rows = given[name].unflatten(0, (-1, donor.in_chans))
            made[name] = torch.einsum("nc,kc...->kn...", writes.to(rows.dtype), rows).flatten(0, 1)
    return made


def _repeated(theirs: int, ours: int) -> Tensor:
    """Which of their channels each of ours stands for, in turn: float32 [ours, theirs], 0 or 1."""
    table = torch.zeros(ours, theirs)
    for place in range(max(ours, theirs)):
        table[place % ours, place % theirs] = 1
    return table


def _named(chosen: Sequence[int], ours: int) -> Tensor:
    """The same, where our channels `chosen` are their red, green and blue and all others the mean."""
    table = torch.full((ours, 3), 1 / 3)
    for colour, place in enumerate(chosen):
        table[place] = torch.eye(3)[colour]
    return table


def places(text: str, channels: int, bands: Sequence[str]) -> list[int]:
    """The three channels, from 0, that `text` names: by the names of bands, or by numbers from 1.

    **Raises:** `UserError` for anything else.
    """
    found = [_place(part.strip(), channels, bands) for part in text.split(",")]
    if len(found) != 3 or len(set(found)) != 3:
        raise UserError(
            f"init_channels is {text!r}, expected {REPEAT}, or three different channels, of red, green and blue: names "
            f"of bands, or numbers from 1 to {channels}"
        )
    return found


def _place(name: str, channels: int, bands: Sequence[str]) -> int:
    lower = [band.lower() for band in bands]
    if name.lower() in lower:
        return lower.index(name.lower())
    if name.isdecimal() and 1 <= int(name) <= channels:
        return int(name) - 1
    known = f"; the bands are {', '.join(bands)}{nearest(name, list(bands))}" if bands else ""
    raise UserError(f"init_channels names {name!r}, expected {REPEAT}, a number from 1 to {channels} or a band{known}")


def _bands(recipe: Recipe) -> tuple[str, ...]:
    """Names of the channels of the recipe's data, if it has any."""
    try:
        return read_info(recipe.data_path).values.bands
    except UserError:  # of weights that are looked at where the data are gone
        return ()
