"""Checkpoints written in the background: complete or not there, whatever a rank or a disk does."""

import dataclasses
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasthpm import checkpoint, recipes
from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.checkpoint import saver as saver_module
from fasthpm.checkpoint import shards
from fasthpm.checkpoint.folder import RunState, damage, newest_valid
from fasthpm.checkpoint.saver import Job, Saver
from fasthpm.ranks.zero import Group, Slot
from tests.helpers.disk import fill
from tests.helpers.launch import ROOT, check_ranks

SLOTS = {"slots": {"student.w": [[5], 0, 0]}, "shards": 2}
MODULE = "fasthpm.pretrain"


def job(output_dir: Path, rank: int, *, step: int = 3) -> Job:
    """Rank `rank` of 2 holds its half of one parameter, padded."""
    part = torch.arange(3.0) + 3 * rank
    layout = {"optimizer_step": step, "groups": [{**SLOTS, "index": rank}]}
    aside = checkpoint_folder.checkpoint_path(output_dir, step)
    return Job(
        aside.with_name(f".writing-{aside.name}"),
        shards.Snapshot({"0/master": part}, layout),
        recipes.debug(),
        RunState(step, {"epoch": 0, "batch": step}, 2, 1),
    )


def pair(timeout: float = 10) -> tuple[Saver, Saver]:
    return Saver(0, 2, timeout=timeout), Saver(1, 2, timeout=timeout)


def test_a_checkpoint_appears_when_every_rank_has_written(tmp_path: Path) -> None:
    zero, one = pair()
    folder = checkpoint_folder.checkpoint_path(tmp_path, 3)
    checkpoint_folder.begin(tmp_path, 3)
    zero.start(job(tmp_path, 0))
    time.sleep(0.3)
    assert not folder.exists()
    with pytest.raises(RuntimeError, match="still being written"):
        zero.start(job(tmp_path, 0))
    one.start(job(tmp_path, 1))
    assert (zero.wait(), one.wait()) == ("", "")
    assert damage(folder) == ""
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "manifest.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "recipe.json",
        "state.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    saved = shards.SavedState(folder)
    assert saved.whole("master", "student.w").tolist() == [0, 1, 2, 3, 4]
    assert saved.optimizer_step == 3
    assert not saved.has("ema")
    (folder / "shards" / "rank-00001.safetensors").unlink()
    with pytest.raises(checkpoint_folder.UserError, match="has 1 of the 2 files that its ranks wrote"):
        shards.SavedState(folder)


def trained_weight() -> tuple[Any, Any]:
    """One master of 5 elements as a `MasterLayout` shows it, and a function that updates it and its state."""
    master = torch.linspace(-1, 1, 5, requires_grad=True)
    optimizer = torch.optim.AdamW([master], lr=0.1)

    def update() -> None:
        master.grad = torch.sin(master.detach() * 9)
        optimizer.step()

    update()
    group = Group(master, torch.float32, (Slot("student.w", master.shape, 0, 0),), shards=1, index=0)

    def shards_of(which: str) -> list[torch.Tensor]:
        return [master if which == "master" else optimizer.state[master][which]]

    return SimpleNamespace(groups=[group], masters=[master], optimizer=optimizer, shards=shards_of), update


def test_training_goes_on_while_the_state_of_one_update_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two saves through the same memory: each file holds, bit for bit, what there was when it was taken."""
    layout, update = trained_weight()
    saver, may_write, write = Saver(0, 1, timeout=10), threading.Event(), shards.write
    monkeypatch.setattr(shards, "write", lambda taken, path: may_write.wait(10) and write(taken, path))
    kinds, places, expected = ("master", "exp_avg", "exp_avg_sq"), [], {}
    for step in (1, 4):
        may_write.clear()
        checkpoint_folder.begin(tmp_path, step)
        taken = saver.take(layout)
        expected[step] = {kind: layout.shards(kind)[0].detach().clone() for kind in kinds}
        saver.start(dataclasses.replace(job(tmp_path, 0, step=step), taken=taken))
        for _ in range(3):
            update()
        with pytest.raises(RuntimeError, match="still being written"):
            saver.take(layout)  # its memory is being read
        may_write.set()
        assert saver.wait() == ""
        places.append([tensor.data_ptr() for tensor in taken.tensors.values()])
    assert places[0] == places[1]
    for step, states in expected.items():
        saved = shards.SavedState(checkpoint_folder.checkpoint_path(tmp_path, step))
        assert saved.optimizer_step == step
        for kind, state in states.items():
            assert torch.equal(saved.whole(kind, "student.w"), state)
            assert not torch.equal(state, layout.shards(kind)[0])


def test_old_checkpoints_go_but_those_to_keep(tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipes.debug(), keep_checkpoints=1, keep_every=1, save_every=1, steps_per_epoch=4)
    for step in (3, 4, 6, 7):
        checkpoint_folder.begin(tmp_path, step)
        savers = pair()
        for rank, saver in enumerate(savers):
            saver.start(dataclasses.replace(job(tmp_path, rank, step=step), recipe=recipe))
        assert [saver.wait() for saver in savers] == ["", ""]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000004", "step-00000007"}


def saved(folder: Path, step: int, keep: int = 1) -> list[str]:
    """What two savers say of a checkpoint; so many are kept."""
    recipe, savers = dataclasses.replace(recipes.debug(), keep_checkpoints=keep, steps_per_epoch=4), pair()
    checkpoint_folder.begin(folder, step)
    for rank, saver in enumerate(savers):
        saver.start(dataclasses.replace(job(folder, rank, step=step), recipe=recipe))
    return [saver.wait() for saver in savers]


def test_no_checkpoint_goes_before_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved(tmp_path, 3) == ["", ""]

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "commit", full)
    assert saved(tmp_path, 4)[0] == "No space left on device"
    assert newest_valid(tmp_path, pytest.fail) == checkpoint_folder.checkpoint_path(tmp_path, 3)


def test_what_is_newer_and_damaged_costs_no_whole_one(tmp_path: Path) -> None:
    """The run has gone back behind it, and what it writes now is the only one to resume from."""
    assert saved(tmp_path, 9) == ["", ""]
    (checkpoint_folder.checkpoint_path(tmp_path, 9) / "manifest.json").unlink()
    assert saved(tmp_path, 6) == ["", ""]
    assert newest_valid(tmp_path, lambda line: None) == checkpoint_folder.checkpoint_path(tmp_path, 6)


def test_each_part_is_on_the_disk_before_it_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []

    def synced(path: Path) -> None:
        rank = int(path.stem[-5:])
        seen.append((path.name, saver_module._marker(path.parent.parent, rank).exists()))

    monkeypatch.setattr(saver_module, "fsync", synced)
    assert saved(tmp_path, 3) == ["", ""]
    assert sorted(seen) == [(f"rank-0000{rank}.safetensors", False) for rank in (0, 1)]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_fails_one_rank_loses_this_checkpoint_alone(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    savers = pair()
    write = shards.write

    def full(taken: shards.Snapshot, path: Path) -> None:
        if path == shards.rank_file(job(tmp_path, 0, step=4).aside, failing):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(taken, path)

    monkeypatch.setattr(shards, "write", full)
    for step, expected in ((3, True), (4, False), (5, True)):
        checkpoint_folder.begin(tmp_path, step)
        for rank, saver in enumerate(savers):
            saver.start(job(tmp_path, rank, step=step))
        problems = [saver.wait() for saver in savers]
        assert ("No space left on device" in problems[0]) is not expected
        assert checkpoint_folder.checkpoint_path(tmp_path, step).exists() is expected
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000003", "step-00000005"}


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("state", ["master", "ema"])
def test_weights_that_are_not_finite_make_no_checkpoint(bad: int, state: str, tmp_path: Path) -> None:
    """Whichever rank has them; the one before stays, and the next one is written again."""
    savers = pair()
    for step, spoilt in ((3, False), (4, True), (5, False)):
        checkpoint_folder.begin(tmp_path, step)
        for rank, saver in enumerate(savers):
            one = job(tmp_path, rank, step=step)
            part = torch.tensor([float("nan") if spoilt and rank == bad else 1.0, 2.0, float("nan")])
            part[2] = 3.0 if rank == 0 else float("nan")  # of rank 1 that is padding
            saver.start(dataclasses.replace(one, taken=dataclasses.replace(one.taken, tensors={f"0/{state}": part})))
        problems = [saver.wait() for saver in savers]
        assert (f"its weights are not finite: {state} of w" in problems[0]) is spoilt
        assert savers[0].unsound is spoilt
        assert checkpoint_folder.checkpoint_path(tmp_path, step).exists() is not spoilt


def test_a_run_that_ends_leaves_no_thread(tmp_path: Path) -> None:
    """Rank 1 is gone: its part will never come, and rank 0 waits for it no longer than the run lives."""
    zero, _ = pair(timeout=60)
    aside = checkpoint_folder.begin(tmp_path, 3)
    begin = time.monotonic()
    zero.start(job(tmp_path, 0))
    assert zero.busy
    zero.close()
    assert not zero.busy
    assert time.monotonic() - begin < 20
    assert not aside.exists()
    assert not checkpoint_folder.checkpoint_path(tmp_path, 3).exists()


def test_a_rank_that_never_writes_is_named(tmp_path: Path) -> None:
    zero, _ = pair(timeout=0.3)
    checkpoint_folder.begin(tmp_path, 3)
    zero.start(job(tmp_path, 0))
    assert zero.wait() == "rank 1 did not write its part within 0.3 s"
    assert not list((tmp_path / "checkpoints").iterdir())


def test_an_error_that_is_no_disks_fault_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero, _ = pair()
    checkpoint_folder.begin(tmp_path, 3)
    monkeypatch.setattr(shards, "write", lambda taken, path: 1 / 0)
    zero.start(job(tmp_path, 0))
    with pytest.raises(ZeroDivisionError):
        zero.wait()
    assert zero.wait() == ""  # said once


def test_a_full_disk_costs_checkpoints_and_not_the_run(small_disk: Path, tmp_path: Path) -> None:
    run = small_disk / "run"
    arguments = [
        "--recipe",
        "debug",
        "--deepspeed_config",
        "zero1_fp32",
        "--data_path",
        "synthetic:64",
        "--batch_size",
        "8",
        "--warmup_epochs",
        "0",
        "--epochs",
        "10",
        "--panel_every",
        "0",
        "--difficulty_every",
        "0",
        "--keep_checkpoints",
        "1",
        "--output_dir",
        str(run),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "FASTHPM_DISK_MINUTES": "0.1"}
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, *arguments], cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE
    )
    try:
        while not list(run.glob("checkpoints/step-*")) and process.poll() is None:
            time.sleep(0.05)
        fill(small_disk)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 2, errors
    assert "was not written" in errors
    assert "earlier ones are intact" in errors
    assert "the checkpoint of update 80, the last, was not written; make room" in errors
    left = newest_valid(run, pytest.fail)
    assert left is not None
    (small_disk / "filler").unlink()
    output = check_ranks(MODULE, *arguments, launcher="forked", ranks=1)
    assert f"resuming from {left}" in output
    assert "finished 80 of 80 updates" in output
