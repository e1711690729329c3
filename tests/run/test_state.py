"""The last checkpoint waits for a disk, for a stated time; a run that branches off says what it does otherwise."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fasthpm
from fasthpm import recipes
from fasthpm.errors import UserError
from fasthpm.ranks.launch import Launch
from fasthpm.run import state
from fasthpm.run.records import read_metrics

FULL = "No space left on device"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, and a disk that is looked at often."""
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda values: None)
    monkeypatch.setattr(state, "RETRY_SECONDS", 0.01)
    monkeypatch.setenv(state.DISK_MINUTES, "0.005")


def run_whose_saves(monkeypatch: pytest.MonkeyPatch, *problems: str, unsound: bool = False) -> Any:
    """A run, past its last update, whose saves end with these problems in turn, then for ever with the last."""
    found = itertools.chain(problems, itertools.repeat(problems[-1]))
    saver = SimpleNamespace(wait=lambda: next(found), unsound=unsound)
    recipe = dataclasses.replace(recipes.debug(), output_dir="OUT")
    launch = Launch(0, 0, 1, 1, torch.device("cpu"))
    run = SimpleNamespace(recipe=recipe, launch=launch, saver=saver, saving=8, unsaved="", tried=0)

    def save(run: Any, *, say: bool = True) -> None:
        run.tried, run.unsaved = run.tried + 1, ""

    monkeypatch.setattr(state, "save", save)
    return run


def test_the_last_checkpoint_is_tried_until_the_disk_takes_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_whose_saves(monkeypatch, FULL, FULL, "Read-only file system", "")
    signs: list[int] = []
    state.finish_last_save(run, alive=lambda: signs.append(run.tried))
    assert (run.tried, signs) == (3, [0, 1, 2])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert FULL in lines[0]
    assert "make room in OUT; it is tried again every 0.01 s for 0.005 minutes (FASTHPM_DISK_MINUTES)" in lines[1]


def test_it_is_given_up_after_the_stated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_whose_saves(monkeypatch, FULL)
    with pytest.raises(UserError, match=r"the checkpoint of update 8, the last, was not written; make room in OUT"):
        state.finish_last_save(run)
    assert run.tried > 2


def test_no_room_would_help_weights_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_whose_saves(monkeypatch, "its weights are not finite: master of a", unsound=True)
    with pytest.raises(UserError, match="was not written: its weights are not finite: master of a; lower the learning"):
        state.finish_last_save(run)
    assert run.tried == 0


def test_a_sound_disk_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_whose_saves(monkeypatch, "")
    state.finish_last_save(run)
    assert run.tried == 0


def test_what_changes_where_a_run_branches_off_is_said() -> None:
    past = dataclasses.replace(recipes.debug(), steps_per_epoch=8, lr=1e-3, epochs=4, warmup_epochs=0.0)
    run: Any = SimpleNamespace(recipe=past, done=32, data="sha256:1")
    assert state.changes(past, run, "sha256:1") == []
    run.recipe = dataclasses.replace(past, epochs=8, log_every=3, data_path="moved")
    assert state.changes(past, run, "sha256:1") == [
        "epochs was 4, it is 8 from here on",
        "the learning rate of the next update is 0.0005, unchanged it would have been 0",
    ]
    said = state.changes(past, run, "sha256:2")
    assert said[1] == f"the data was {past.data_path}, it is moved from here on"


def test_a_run_that_branches_off_goes_on_and_leaves_the_other_alone(tmp_path: Path) -> None:
    """The weights, the moments and the update of the checkpoint, in a folder of its own."""
    flags: dict[str, Any] = {"data_path": "synthetic:16", "warmup_epochs": 0, "panel_every": 0, "difficulty_every": 0}
    flags["model"] = "hpm_vit_pico_patch4_28"
    first = fasthpm.pretrain(recipe="debug", epochs=2, stop_after=2, output_dir=tmp_path / "a", **flags)
    before = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    flags |= {"output_dir": tmp_path / "b", "epochs": 3, "blr": 1e-4, "resume": first.checkpoint, "stop_after": 3}
    assert fasthpm.pretrain(recipe="debug", **flags).updates == 3
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == before
    assert [record["step"] for record in read_metrics(tmp_path / "b")] == [3]
