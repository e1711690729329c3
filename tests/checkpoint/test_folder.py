"""Checkpoints as files: atomic, verified, rotated, refused when wrong."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fasthpm import files
from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.checkpoint import shards
from fasthpm.checkpoint.folder import RunState, require_space
from fasthpm.errors import UserError
from fasthpm.recipe import Recipe, save_recipe, science_of
from tests.helpers.runs import recipe_in, write


def test_commit_is_complete_and_leaves_nothing_aside(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [folder.name]
    assert checkpoint_folder.damage(folder) == ""
    assert checkpoint_folder.read_state(folder) == RunState(7, {"epoch": 1, "batch": 2}, 2, 1)


def test_a_killed_save_is_never_seen(tmp_path: Path) -> None:
    good = write(tmp_path, 1)
    aside = checkpoint_folder.begin(tmp_path, 2)
    (aside / "student.safetensors").write_bytes(b"half")
    assert checkpoint_folder.newest_valid(tmp_path, pytest.fail) == good
    assert write(tmp_path, 2).is_dir()  # the next attempt at the same step clears what the first one left


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that was not synced already, then the name: a machine that loses power keeps a whole one or none."""
    final, seen = checkpoint_folder.checkpoint_path(tmp_path, 7), []
    monkeypatch.setattr(checkpoint_folder, "fsync", lambda path: seen.append((path, final.exists())))
    aside = checkpoint_folder.begin(tmp_path, 7)
    for name in ("synced", "not synced"):
        (aside / name).write_text(name)
    synced = {"synced": [6, files.file_hash(aside / "synced")]}
    checkpoint_folder.commit(aside, recipe_in(tmp_path), RunState(7, {}, 1, 1), synced)
    names = {"not synced", "recipe.json", "state.json", "manifest.json"}
    assert {path for path, named in seen if not named} == {aside / name for name in names}
    assert [path for path, named in seen if named] == [final.parent]
    assert set(json.loads((final / "manifest.json").read_text())) == {"synced", *names} - {"manifest.json"}
    assert checkpoint_folder.damage(final) == ""


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    old, new = write(tmp_path, 1), write(tmp_path, 2)
    shard = new / "shards" / "part"
    data = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    elif damage == "truncate":
        shard.write_bytes(data[:-1])
    elif damage == "remove":
        shard.unlink()
    else:
        (new / "manifest.json").unlink()
    warnings: list[str] = []
    assert checkpoint_folder.newest_valid(tmp_path, warnings.append) == old
    assert len(warnings) == 1
    assert str(new) in warnings[0]


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_manifest_does_not_lead_out_of_its_checkpoint(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "secret").write_text("x")
    path = folder / name
    manifest[name] = [path.stat().st_size, files.file_hash(path)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint_folder.damage(folder) == f"manifest.json leads out of the checkpoint, to {name}"


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (1, 2, 10, 3)]
    checkpoint_folder.rotate(tmp_path, 2)
    assert [f.exists() for f in folders] == [False, False, True, True]


def test_rotation_keeps_some_for_ever(tmp_path: Path) -> None:
    for step in (0, 3, 6, 9, 12, 15, 18):
        checkpoint_folder.rotate(tmp_path, 2, newest=write(tmp_path, step), every=6)
    kept = sorted(checkpoint_folder.step_of(folder) for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == [6, 12, 15, 18]  # not 0: nothing is learnt there


def test_rotation_never_deletes_the_checkpoint_just_written(tmp_path: Path) -> None:
    """Two of later updates are damaged: the run has gone back behind them, and must not lose what it writes now."""
    for step in (4, 10, 12):
        folder = write(tmp_path, step)
        if step > 4:
            (folder / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "step-00000004-copy").mkdir()  # a user's own
    newest = write(tmp_path, 6)
    checkpoint_folder.rotate(tmp_path, 2, newest=newest)
    assert checkpoint_folder.newest_valid(tmp_path, lambda line: None) == newest
    checkpoint_folder.rotate(tmp_path, 1, newest=newest)
    assert checkpoint_folder.newest_valid(tmp_path, lambda line: None) == newest
    assert (tmp_path / "checkpoints" / "step-00000004-copy").is_dir()


def test_resume_choices(tmp_path: Path) -> None:
    assert checkpoint_folder.find_resume(recipe_in(tmp_path), pytest.fail) is None
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert checkpoint_folder.find_resume(recipe_in(tmp_path), pytest.fail) == second
    assert checkpoint_folder.find_resume(recipe_in(tmp_path, resume=str(first)), pytest.fail) == first
    with pytest.raises(UserError, match="already holds checkpoints and --resume is none"):
        checkpoint_folder.find_resume(recipe_in(tmp_path, resume="none"), pytest.fail)
    with pytest.raises(UserError, match=r"nowhere: manifest\.json is missing"):
        checkpoint_folder.find_resume(recipe_in(tmp_path, resume="nowhere"), pytest.fail)


def test_another_recipes_folder_is_refused(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    checkpoint_folder.compare_recipes(recipe, science_of)
    write(tmp_path, 1)
    save_recipe(recipe, tmp_path / "recipe.json")
    checkpoint_folder.compare_recipes(dataclasses.replace(recipe, log_every=3, resume="none"), science_of)
    with pytest.raises(UserError, match=r"belongs to a run with mask_ratio 0\.75, this one has 0\.5; use another"):
        checkpoint_folder.compare_recipes(dataclasses.replace(recipe, mask_ratio=0.5), science_of)


def recorded(folder: Path, **changes: object) -> Recipe:
    """A new start of a run whose global batch was 12."""
    write(folder, 1)
    save_recipe(recipe_in(folder, global_batch_size=12, batch_size=6, accum_iter=1), folder / "recipe.json")
    return recipe_in(folder, **changes)


@pytest.mark.parametrize(
    ("devices", "batch_size", "expected"),
    [(1, 6, (6, 2)), (2, 6, (6, 1)), (3, 6, (4, 1)), (1, 5, (4, 3)), (4, 2, (1, 3)), (12, 6, (1, 1)), (1, 99, (12, 1))],
)
def test_a_run_keeps_its_global_batch(tmp_path: Path, devices: int, batch_size: int, expected: tuple[int, int]) -> None:
    recipe = checkpoint_folder.continued(recorded(tmp_path, batch_size=batch_size), devices)
    assert (recipe.batch_size, recipe.accum_iter) == expected
    assert recipe.global_batch_size == 12 == recipe.batch_size * recipe.accum_iter * devices


def test_a_global_batch_that_devices_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a global batch of 12, which 5 devices do not divide"):
        checkpoint_folder.continued(recorded(tmp_path), 5)
    other = recorded(tmp_path, global_batch_size=24)
    assert checkpoint_folder.continued(other, 2) == other  # another batch was asked for: compare_recipes refuses it
    fresh = recipe_in(tmp_path / "fresh")
    assert checkpoint_folder.continued(fresh, 5) == fresh


def test_a_checkpoint_is_not_begun_without_space(tmp_path: Path) -> None:
    require_space(tmp_path, 1000)
    with pytest.raises(UserError, match="GiB left and a checkpoint needs about") as caught:
        require_space(tmp_path, 10**13)
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_space_asked_for_is_that_of_a_state_with_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"0/{state}": torch.zeros(100_000) for state in shards.STATES}
    shards.write(shards.Snapshot(tensors, {}), tmp_path / "shards" / "part")
    size = (tmp_path / "shards" / "part").stat().st_size
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    with pytest.raises(UserError, match="free some space"):
        require_space(tmp_path, 100_000)


def test_the_oldest_checkpoint_tells_which_maps_are_needed(tmp_path: Path) -> None:
    assert checkpoint_folder.oldest_step(tmp_path) == 0
    for step in (4, 12, 8):
        write(tmp_path, step)
    assert checkpoint_folder.oldest_step(tmp_path) == 4
