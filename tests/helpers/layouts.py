"""Training states laid out as DeepSpeed does it, without DeepSpeed or ranks: whole, flat or striped, over W shards."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fasthpm.ranks.zero import Group, Slot

KINDS = ("whole", "flat", "striped")


def group_of(values: dict[str, Tensor], kind: str, world: int, rank: int, dtype: torch.dtype = torch.float32) -> Group:
    """One group that holds these parameters one after the other; its master is this rank's shard, padded by zeros."""
    slots, offset = [], 0
    for name, value in values.items():
        stripe = -(-value.numel() // world) if kind == "striped" else 0
        slots.append(Slot(name, value.shape, offset, stripe))
        offset += stripe or value.numel()
    if kind == "striped":
        parts = [padded(value, world)[rank] for value in values.values()]
    else:
        parts = [padded(torch.cat([value.flatten() for value in values.values()]), world)[rank]]
    return Group(torch.cat(parts).clone(), dtype, tuple(slots), world, rank)


def padded(values: Tensor, world: int) -> Tensor:
    """[W, S] of any number of values."""
    flat = values.flatten()
    return pad(flat, (0, -len(flat) % world)).reshape(world, -1)


def layout_of(
    states: dict[str, dict[str, Tensor]], kind: str, world: int, rank: int, names: Sequence[Sequence[str]]
) -> Any:
    """What `shards` needs of a `MasterLayout`; `states`: parameters by name, of each state; `names`: of every group."""
    if kind == "whole":
        names, world, rank = [[name] for group in names for name in group], 1, 0
    found = {
        which: [group_of({name: values[name] for name in group}, kind, world, rank) for group in names]
        for which, values in states.items()
    }
    groups = found["master"]
    state = {
        group.master: {which: found[which][number].master for which in states if which != "master"}
        | {"step": torch.tensor(7.0)}
        for number, group in enumerate(groups)
    }
    published: list[bool] = []
    return SimpleNamespace(
        groups=groups,
        masters=[group.master for group in groups],
        optimizer=SimpleNamespace(state=state),
        shards=lambda which: [g.master if which == "master" else state[g.master][which] for g in groups],
        publish_masters=lambda: published.append(True),
        published=published,
    )
