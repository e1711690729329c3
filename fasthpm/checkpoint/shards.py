"""The training state on disk: float32 masters, optimizer moments and EMA, as every rank holds them.

Each rank writes what is in its memory, without talking to the others, and says which part of which parameter it is.
Reading joins the parts by parameter name, so a state can be read by one process, by another number of ranks or under
another ZeRO stage. safetensors only: nothing in a checkpoint is unpickled.

    shards/rank-00000.safetensors   tensors "<group>/<state>" float32 [S]; metadata: the layout below, as JSON
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fasthpm.errors import UserError
from fasthpm.files import save_tensors
from fasthpm.ranks.zero import Group, MasterLayout, State

FOLDER = "shards"
STATES: tuple[State, ...] = ("master", "exp_avg", "exp_avg_sq", "ema")
WEIGHTS: tuple[State, ...] = ("master", "ema")  # of these


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of the state on the CPU, apart from the training that goes on."""

    tensors: dict[str, Tensor]
    # {"optimizer_step", "groups": [{"shards", "index", "slots": {name: [shape, offset, stripe]}}]}
    layout: dict[str, Any]


def rank_file(folder: Path, rank: int) -> Path:
    """Where `rank` writes its part."""
    return folder / FOLDER / f"rank-{rank:05d}.safetensors"


def _states(layout: MasterLayout) -> tuple[State, ...]:
    return STATES if "ema" in layout.optimizer.state[layout.masters[0]] else STATES[:-1]


def _describe(group: Group) -> dict[str, Any]:
    slots = {slot.name: [list(slot.shape), slot.offset, slot.stripe] for slot in group.slots}
    return {"shards": group.shards, "index": group.index, "slots": slots}


class Staging:
    """CPU memory for a rank's snapshots, one at a time: 16 bytes per parameter of its share, kept from save to save.

    Getting fresh memory from the system costs more than copying into it. It is page-locked where a GPU fills it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def room(self, name: str, like: Tensor) -> Tensor:
        """Memory for the elements of `like`: [numel], its dtype, with whatever it held before."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() != like.numel() or kept.dtype != like.dtype:
            kept = torch.empty(like.numel(), dtype=like.dtype, pin_memory=like.is_cuda)
            self._kept[name] = kept
        return kept


@torch.no_grad()
def snapshot(layout: MasterLayout, rank: int, staging: Staging) -> Snapshot:
    """Copy this rank's state to the CPU, over the last one in `staging`. What every rank holds whole is rank 0's."""
    tensors = {}
    for state in _states(layout):
        for number, (group, shard) in enumerate(zip(layout.groups, layout.shards(state), strict=True)):
            if group.shards > 1 or rank == 0:
                name, flat = f"{number}/{state}", shard.detach().reshape(-1)
                tensors[name] = staging.room(name, flat).copy_(flat, non_blocking=True)
    if layout.masters[0].is_cuda:
        torch.cuda.synchronize(layout.masters[0].device)
    step = int(layout.optimizer.state[layout.masters[0]]["step"])
    return Snapshot(tensors, {"optimizer_step": step, "groups": [_describe(group) for group in layout.groups]})


def not_finite(layout: dict[str, Any], part: Callable[[str], Tensor | None]) -> str:
    """The first parameter whose weights (master, EMA) in a rank's part are not finite, or an empty string.

    - `part`: the flat tensor [S] of "<group>/<state>", None where the rank has none; its padding is not looked at
    """
    for number, group in enumerate(layout["groups"]):
        for state in WEIGHTS:
            flat = part(f"{number}/{state}")
            if flat is None or bool(flat.isfinite().all()):
                continue
            for name, (shape, offset, stripe) in group["slots"].items():
                first, last = _span(offset, torch.Size(shape).numel(), stripe, group["index"], len(flat))
                begin = offset if stripe else offset + first - group["index"] * len(flat)
                if first < last and not bool(flat[begin : begin + last - first].isfinite().all()):
                    return f"{state} of {name.removeprefix('student.')}"
    return ""


def weights_not_finite(folder: Path) -> str:
    """Which weights of a checkpoint are nan or infinite, or an empty string; what cannot be read is not judged here."""
    for path in sorted(folder.glob(f"{FOLDER}/rank-*.safetensors")) + sorted(folder.glob("*.safetensors")):
        with suppress(OSError, SafetensorError, ValueError, KeyError), safe_open(path, framework="pt") as file:
            layout = (file.metadata() or {}).get("layout", "")
            if layout:
                found = not_finite(json.loads(layout), partial(_tensor_or_none, file))
            else:
                names = sorted(file.keys())
                found = next((name for name in names if not bool(file.get_tensor(name).isfinite().all())), "")
            if found:
                return f"its weights are not finite: {found}, {path.name}"
    return ""


def _tensor_or_none(file: Any, name: str) -> Tensor | None:
    return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118


def write(taken: Snapshot, path: Path) -> None:
    """Write a snapshot to `path`.

    **Raises:** `OSError` if the disk does not take it.
    """
    path.parent.mkdir(exist_ok=True)
    save_tensors(taken.tensors, path, {"layout": json.dumps(taken.layout)})


@dataclass(frozen=True)
class _Place:
    group: int
    shape: tuple[int, ...]
    offset: int
    stripe: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class SavedState:
    """A state that any number of ranks wrote; tensors are read when asked for, from memory-mapped files.

    **Raises:** `UserError` if a rank's file is missing or foreign.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = sorted((folder / FOLDER).glob("rank-*.safetensors"))
        if not self._paths:
            raise UserError(f"{folder} holds no training state ({FOLDER}/rank-00000.safetensors); nothing can resume")
        try:
            self._files = [safe_open(path, framework="pt") for path in self._paths]
            self.layouts = [json.loads((file.metadata() or {})["layout"]) for file in self._files]
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{folder / FOLDER} is not a training state of this program ({error})") from error
        self._places = {
            name: _Place(number, tuple(shape), offset, stripe)
            for number, group in enumerate(self.layouts[0]["groups"])
            for name, (shape, offset, stripe) in group["slots"].items()
        }
        self._sizes = [self._files[0].get_slice(f"{n}/master").get_shape()[0] for n in range(self._count)]
        self._check_files(folder)

    @property
    def _count(self) -> int:
        return len(self.layouts[0]["groups"])

    @property
    def names(self) -> list[str]:
        """Parameters, as in the training module."""
        return list(self._places)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters."""
        return {name: place.shape for name, place in self._places.items()}

    @property
    def optimizer_step(self) -> int:
        """Updates that the moments have seen."""
        return int(self.layouts[0]["optimizer_step"])

    def has(self, state: State) -> bool:
        """Whether `state` was saved."""
        return f"0/{state}" in self._files[0].keys()  # noqa: SIM118  (no mapping: safetensors has only keys())

    def whole(self, state: State, name: str) -> Tensor:
        """One parameter's state, joined: float32, the parameter's shape."""
        place = self._places[name]
        parts = list(self._parts(state, place))
        return torch.cat(parts)[: place.numel].view(place.shape)

    def own(self, state: State, number: int, group: Group) -> Tensor | None:
        """The shard [S] of `group`, if a rank in the same place of the same layout wrote it; else None."""
        if group.index >= len(self._files):
            return None
        same = number < self._count and self.layouts[group.index]["groups"][number] == _describe(group)
        return self._files[group.index].get_tensor(f"{number}/{state}") if same else None

    def _parts(self, state: State, place: _Place) -> Iterator[Tensor]:
        key, size = f"{place.group}/{state}", self._sizes[place.group]
        for index in range(self.layouts[0]["groups"][place.group]["shards"]):
            if place.stripe:
                first, last = place.offset, place.offset + place.stripe
            else:
                first = min(max(place.offset - index * size, 0), size)
                last = min(max(place.offset + place.numel - index * size, 0), size)
            if first < last:
                yield self._files[index].get_slice(key)[first:last]

    def _check_files(self, folder: Path) -> None:
        needed = max(group["shards"] for group in self.layouts[0]["groups"])
        if len(self._files) < needed:
            raise UserError(f"{folder / FOLDER} has {len(self._files)} of the {needed} files that its ranks wrote")


@torch.no_grad()
def restore(layout: MasterLayout, saved: SavedState) -> None:
    """Put a saved state into this rank's masters, moments and EMA, then into the forward weights (collective).

    **Raises:** `UserError` listing parameters that the state lacks, or whose shapes differ.
    """
    _check_names(layout, saved)
    for state in _states(layout):
        for number, (group, shard) in enumerate(zip(layout.groups, layout.shards(state), strict=True)):
            own = saved.own(state, number, group)
            flat = shard.detach().view(-1)
            if own is not None:
                flat.copy_(own)
            else:
                _assemble(flat, group, saved, state)
    for master in layout.masters:
        layout.optimizer.state[master]["step"].fill_(saved.optimizer_step)
    layout.publish_masters()


def _check_names(layout: MasterLayout, saved: SavedState) -> None:
    wanted = {slot.name: tuple(slot.shape) for group in layout.groups for slot in group.slots}
    wrong = sorted({*wanted.items()} ^ {*saved.shapes.items()})
    if wrong or not all(saved.has(state) for state in _states(layout)):
        what = ", ".join(f"{name} {list(shape)}" for name, shape in wrong[:6]) or "no EMA"
        raise UserError(f"the checkpoint is of another model: {what}; resume with the recipe that wrote it")


def _assemble(flat: Tensor, group: Group, saved: SavedState, state: State) -> None:
    """Fill this rank's shard [S] of `group` from parameters by name; padding becomes 0."""
    flat.zero_()
    for slot in group.slots:
        first, last = _span(slot.offset, slot.shape.numel(), slot.stripe, group.index, len(flat))
        if first < last:
            begin = slot.offset if slot.stripe else slot.offset + first - group.index * len(flat)
            flat[begin : begin + last - first] = saved.whole(state, slot.name).view(-1)[first:last].to(flat.device)


def _span(offset: int, numel: int, stripe: int, index: int, size: int) -> tuple[int, int]:
    """Which elements [first, last) of a parameter lie in shard `index` of `size` elements."""
    if stripe:
        return min(index * stripe, numel), min((index + 1) * stripe, numel)
    return max(index * size - offset, 0), min((index + 1) * size - offset, numel)
