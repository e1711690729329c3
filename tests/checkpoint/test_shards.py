"""Each rank's part of the training state as files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.checkpoint import shards
from tests.helpers.layouts import KINDS, layout_of


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(checkpoint_folder.UserError, match="holds no training state"):
        shards.SavedState(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "rank-00000.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(checkpoint_folder.UserError, match="is not a training state of this program"):
        shards.SavedState(tmp_path)


def test_a_file_that_the_disk_cannot_hold_is_an_os_error(small_disk: Path) -> None:
    taken = shards.Snapshot({"0/master": torch.zeros(16 << 20)}, {})
    with pytest.raises(OSError, match="No space left on device"):
        shards.write(taken, small_disk / "shards" / "rank-00000.safetensors")


# -------------------------------------------------------------------------------------------------- any layout
SHAPES = {"a": (3, 5), "b": (7,), "c": (1,), "d": (4, 2)}
GROUPS = (("a", "b"), ("c", "d"))
WAYS = [(kind, world) for kind in KINDS for world in (1, 2, 3)]


def states_of(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        which: {name: torch.randn(shape, generator=generator) for name, shape in {**SHAPES, **shapes}.items()}
        for which in shards.STATES
    }


def written(folder: Path, states: dict[str, dict[str, Tensor]], kind: str, world: int) -> shards.SavedState:
    """The state as all ranks write it."""
    folder.mkdir()
    for rank in range(world):
        taken = shards.snapshot(layout_of(states, kind, world, rank, GROUPS), rank, shards.Staging())
        assert bool(taken.tensors) == (kind != "whole" or rank == 0)  # what all hold is written once
        if taken.tensors:
            shards.write(taken, shards.rank_file(folder, rank))
    return shards.SavedState(folder)


@pytest.mark.parametrize(("kind", "world"), WAYS)
def test_a_state_is_restored_to_the_bit_under_any_layout(tmp_path: Path, kind: str, world: int) -> None:
    """By parameter name; padding is zero, whatever there was before."""
    states = states_of()
    saved = written(tmp_path / "state", states, kind, world)
    assert sorted(saved.names) == sorted(SHAPES)
    for which, values in states.items():
        assert all(torch.equal(saved.whole(which, name), value) for name, value in values.items())  # type: ignore
    for other, ranks in WAYS:
        for rank in range(ranks):
            want = layout_of(states, other, ranks, rank, GROUPS)
            got = layout_of(states_of(1), other, ranks, rank, GROUPS)
            for which in shards.STATES:
                for shard in got.shards(which):
                    shard.fill_(torch.nan)
            for master in got.masters:
                got.optimizer.state[master]["step"].fill_(3)
            shards.restore(got, saved)
            assert got.published == [True]
            assert {int(state["step"]) for state in got.optimizer.state.values()} == {7}
            for which in shards.STATES:
                for one, two in zip(got.shards(which), want.shards(which), strict=True):
                    assert torch.equal(one, two), (other, ranks, rank, which)


def test_a_state_of_other_shapes_or_without_a_teacher_is_refused(tmp_path: Path) -> None:
    states = states_of()
    saved = written(tmp_path / "other", states_of(d=(2, 4)), "flat", 1)
    with pytest.raises(checkpoint_folder.UserError, match=r"of another model: d \[2, 4\], d \[4, 2\]; resume with"):
        shards.restore(layout_of(states, "flat", 1, 0, GROUPS), saved)
    without = {which: values for which, values in states.items() if which != "ema"}
    saved = written(tmp_path / "without", without, "flat", 1)
    shards.restore(layout_of(without, "flat", 2, 1, GROUPS), saved)
    with pytest.raises(checkpoint_folder.UserError, match="of another model: no EMA; resume with"):
        shards.restore(layout_of(states, "flat", 1, 0, GROUPS), saved)
