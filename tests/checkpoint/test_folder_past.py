"""What a folder says about the run that goes on in it: nothing without a checkpoint, all that a sound one holds."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.data.identity import identity_of
from fasthpm.errors import UserError
from fasthpm.files import file_hash
from fasthpm.recipe import Recipe, save_recipe, science_of
from tests.helpers.runs import recipe_in, write

COUNTS = {"global_batch_size": 12, "batch_size": 6, "accum_iter": 1}


def with_hashes(folder: Path) -> None:
    """Write a checkpoint's manifest anew: what its files hold now is what they should hold."""
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    manifest = {name: [(folder / name).stat().st_size, file_hash(folder / name)] for name in names}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def spoil(folder: Path, value: float, name: str = "student.safetensors") -> None:
    """Put one number that is not finite into a checkpoint's weights, all hashes right."""
    weights = load_file(folder / name)
    next(iter(weights.values())).view(-1)[-1] = value
    save_file(weights, folder / name)
    with_hashes(folder)


def remember(folder: Path, data: str) -> None:
    """Have a checkpoint know its data."""
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "data": data}))
    with_hashes(folder)


def refusal(recipe: Recipe, data: str) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint_folder.compare_recipes(recipe, science_of, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("left", ["recipe.json", "empty folder", "half a checkpoint"])
def test_a_folder_without_a_checkpoint_has_no_past(tmp_path: Path, left: str) -> None:
    """Whatever a killed run has put into it: the batch and the learning rate are those that this command asks for."""
    save_recipe(recipe_in(tmp_path, **COUNTS, mask_ratio=0.5), tmp_path / "recipe.json")
    if left == "empty folder":
        (tmp_path / "checkpoints").mkdir()
    if left == "half a checkpoint":
        checkpoint_folder.begin(tmp_path, 3, {"recipe.json": "{}"})
    asked = recipe_in(tmp_path, batch_size=64)
    assert checkpoint_folder.past_of(asked) is None
    assert checkpoint_folder.continued(asked, 1) == asked
    checkpoint_folder.compare_recipes(asked, science_of, "synthetic:9")
    assert checkpoint_folder.find_resume(asked, pytest.fail) is None


def test_a_folder_that_lost_its_recipe_has_its_checkpoints_past(tmp_path: Path) -> None:
    write(tmp_path, 1)
    asked = recipe_in(tmp_path, mask_ratio=0.5)
    assert "belongs to a run with mask_ratio 0.75" in refusal(asked, "")
    (tmp_path / "recipe.json").write_text("half a rec")
    assert "belongs to a run with mask_ratio 0.75" in refusal(asked, "")


@pytest.mark.parametrize("kind", ["nan", "truncated", "missing", "no manifest"])
def test_a_folder_whose_checkpoints_are_all_damaged_is_refused(tmp_path: Path, kind: str) -> None:
    folders = [write(tmp_path, step) for step in (4, 8)]
    for folder in folders:
        shard = folder / "shards" / "part"
        if kind == "nan":
            spoil(folder, float("nan"))
        elif kind == "truncated":
            shard.write_bytes(shard.read_bytes()[:-1])
        else:
            (shard if kind == "missing" else folder / "manifest.json").unlink()
    warnings: list[str] = []
    with pytest.raises(UserError, match=r"all 2 checkpoints in .* are damaged") as caught:
        checkpoint_folder.find_resume(recipe_in(tmp_path), warnings.append)
    for part in ("step-00000004: ", "step-00000008: ", "another --output_dir"):
        assert part in str(caught.value)
    assert len(warnings) == 2
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_damage(tmp_path: Path, value: float) -> None:
    sound, spoilt = write(tmp_path, 1), write(tmp_path, 2)
    spoil(spoilt, value)
    warnings: list[str] = []
    assert checkpoint_folder.find_resume(recipe_in(tmp_path), warnings.append) == sound
    assert "its weights are not finite: " in warnings[0]
    with pytest.raises(UserError, match="its weights are not finite"):
        checkpoint_folder.find_resume(recipe_in(tmp_path, resume=str(spoilt)), warnings.append)


def test_the_data_is_what_it_holds_and_not_its_path(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    recipe = dataclasses.replace(recipe_in(tmp_path), data_path="a.beton")
    save_recipe(recipe, tmp_path / "recipe.json")
    moved = dataclasses.replace(recipe, data_path="elsewhere/b.beton")
    # A checkpoint from before knows the path alone.
    checkpoint_folder.compare_recipes(recipe, science_of, "sha256:1")
    assert "belongs to a run with data_path 'a.beton'" in refusal(moved, "sha256:1")
    remember(folder, "sha256:1")
    for same in (recipe, moved):
        checkpoint_folder.compare_recipes(same, science_of, "sha256:1")
    said = refusal(recipe, "sha256:2")
    assert said.startswith("data_path a.beton is not what the run in")
    assert f"--init_from {tmp_path} and another --output_dir" in said
    assert "belongs to a run with data_path 'a.beton'" in refusal(moved, "sha256:2")
    assert checkpoint_folder.damage(folder) == ""


def test_an_old_checkpoints_data_may_still_lie_where_it_lay(tmp_path: Path) -> None:
    """Then the same data elsewhere is no other data, though the checkpoint does not know its hash."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"x")
    out = tmp_path / "out"
    write(out, 1)
    recipe = dataclasses.replace(recipe_in(out), data_path=str(tmp_path / "old"))
    save_recipe(recipe, out / "recipe.json")
    moved = dataclasses.replace(recipe, data_path=str(tmp_path / "new"))
    checkpoint_folder.compare_recipes(moved, science_of, identity_of(moved.data_path))
    (tmp_path / "new" / "x.png").write_bytes(b"y")
    assert "belongs to a run with data_path" in refusal(moved, identity_of(moved.data_path))


@pytest.mark.parametrize(
    ("changes", "ways"),
    [
        ({"epochs": 999}, ("--resume", "--init_from")),
        ({"blr": 1e-5}, ("--resume", "--init_from")),
        ({"global_batch_size": 4}, ("--init_from",)),
        ({"patch_size": 7}, ()),
    ],
)
def test_a_refusal_names_a_way_on(tmp_path: Path, changes: dict[str, float], ways: tuple[str, ...]) -> None:
    newest = [write(tmp_path, step) for step in (1, 2)][-1]
    said = refusal(dataclasses.replace(recipe_in(tmp_path), **changes), "")  # type: ignore[arg-type]
    assert f"belongs to a run with {next(iter(changes))} " in said
    assert [way for way in ("--resume", "--init_from") if way in said] == list(ways)
    assert (f"--resume {newest}" in said) is ("--resume" in ways)


def test_a_run_branches_off_another_folders_checkpoint(tmp_path: Path) -> None:
    """With other settings; where it has checkpoints of its own it goes on from those with the same command."""
    theirs = write(tmp_path / "theirs", 8)
    asked = recipe_in(tmp_path / "ours", resume=str(theirs), epochs=999)
    checkpoint_folder.compare_recipes(asked, science_of, "synthetic:1")
    assert checkpoint_folder.find_resume(asked, pytest.fail) == theirs
    ours = write(tmp_path / "ours", 9)
    assert checkpoint_folder.find_resume(asked, pytest.fail) == ours
    assert "belongs to a run with epochs" in refusal(asked, "")


@pytest.mark.parametrize("field", checkpoint_folder.COUNTED)
def test_updates_that_would_count_otherwise_are_refused(tmp_path: Path, field: str) -> None:
    folder = write(tmp_path, 1)
    checkpoint_folder.check_counts(folder, recipe_in(tmp_path, epochs=999))
    with pytest.raises(UserError, match=f"was written with {field} "):
        checkpoint_folder.check_counts(folder, recipe_in(tmp_path, **{field: 77}))


def test_no_padding_is_judged() -> None:
    """Only the parameters' own elements count, on every rank, in shards and in stripes."""
    from fasthpm.checkpoint import shards

    slots = {"student.a": [[3], 0, 0], "student.b": [[2], 3, 0]}
    for index, bad, found in ((0, 2, "a"), (1, 0, "b"), (1, 2, "")):  # two ranks of 3: a a a | b b padding
        flat = torch.zeros(3)
        flat[bad] = float("nan")
        layout = {"groups": [{"shards": 2, "index": index, "slots": slots}]}
        said = shards.not_finite(layout, {"0/ema": flat}.get)
        assert said == (f"ema of {found}" if found else "")
    layout = {"groups": [{"shards": 2, "index": 1, "slots": {"student.c": [[5], 0, 3], "student.d": [[2], 3, 1]}}]}
    for bad, found in ((1, "c"), (2, ""), (3, "d")):  # stripes: rank 1 has c[3:5] and padding, then d[1:2]
        flat = torch.zeros(4)
        flat[bad] = float("inf")
        assert shards.not_finite(layout, {"0/master": flat}.get) == (f"master of {found}" if found else "")
