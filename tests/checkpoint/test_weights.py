"""The weights of a run: loaded, and those that a run begins with."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasthpm import checkpoint, recipes
from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.checkpoint import shards, weights
from fasthpm.checkpoint.folder import TUNED
from fasthpm.checkpoint.weights import has_teacher, load_weights
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe, save_recipe
from tests.helpers.published import imported_debug
from tests.helpers.runs import away, recipe_in, run_of, signed, write


def test_initial_weights(tmp_path: Path) -> None:
    start = imported_debug(tmp_path)
    recipe = Recipe(**{**vars(recipes.debug()), "init_from": str(start)})
    assert torch.equal(weights.initial_model(recipe).cls_token, load_weights(start)[0].cls_token)
    fresh = model_of(recipe).cls_token
    assert torch.equal(weights.initial_model(recipes.debug()).cls_token, fresh)
    with pytest.raises(
        UserError, match=r"imported: hpm weights do not fit the model: missing \['blocks.4.norm1.weight'"
    ):
        weights.initial_model(Recipe(**{**vars(recipe), "model": "hpm_vit_tiny_patch4_28"}))
    with pytest.raises(UserError, match="holds no valid checkpoint"):
        weights.initial_model(Recipe(**{**vars(recipe), "init_from": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match=r"holds imported weights and no optimizer state to resume; .* --init_from"):
        checkpoint_folder.find_resume(Recipe(**{**vars(recipe), "output_dir": str(start)}), pytest.fail)


def test_learned_positions_are_no_start(tmp_path: Path) -> None:
    start = imported_debug(tmp_path, lambda state: state["pos_embed"].add_(0.1))
    with pytest.raises(UserError, match="has a learned pos_embed, and pretraining keeps the fixed"):
        weights.initial_model(Recipe(**{**vars(recipes.debug()), "init_from": str(start)}))


def test_positions_may_be_rounded_and_in_no_direction_learned(tmp_path: Path) -> None:
    """The fixed table is taken, not the rounded one."""
    for number, (shift, refused) in enumerate(((-0.1, True), (-5e-4, False), (5e-4, False))):
        (tmp_path / str(number)).mkdir()
        start = imported_debug(tmp_path / str(number), lambda state, shift=shift: state["pos_embed"].add_(shift))
        recipe = Recipe(**{**vars(recipes.debug()), "init_from": str(start)})
        if refused:
            with pytest.raises(UserError, match="has a learned pos_embed"):
                weights.initial_model(recipe)
        else:
            assert torch.equal(weights.initial_model(recipe).pos_embed, model_of(recipe).pos_embed)


def test_student_and_teacher_of_a_state_to_resume(tmp_path: Path) -> None:
    """Each has its own weights, out of the one file that holds both."""
    recipe = recipe_in(tmp_path, input_size="12")
    models = {"student": away(recipe, seed=5), "teacher": away(recipe, seed=6)}
    tensors, slots = {}, {}
    for kind, model in zip(("master", "ema"), models.values(), strict=True):
        offset, parts = 0, []
        for name, weight in model.named_parameters():
            slots[f"student.{name}"] = [list(weight.shape), offset, 0]
            offset += weight.numel()
            parts.append(weight.detach().flatten())
        tensors[f"0/{kind}"] = torch.cat(parts)
    aside = checkpoint_folder.begin(tmp_path, 3)
    layout = {"optimizer_step": 3, "groups": [{"slots": slots, "shards": 1, "index": 0}]}
    shards.write(shards.Snapshot(tensors, layout), shards.rank_file(aside, 0))
    checkpoint_folder.commit(aside, recipe, checkpoint_folder.RunState(3, {}, 1, 1))
    for which, model in models.items():
        found = load_weights(tmp_path, which)[0].state_dict()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


MODES: list[dict[str, Any]] = [
    {},
    {"decoder_attention": "cross"},
    {"difficulty": "masked_query"},
    {"difficulty": "in_place"},
    {"difficulty": "measured"},
    {"difficulty": "measured", "predict_loss": "none"},
    {"difficulty": "in_place", "predict_loss": "none"},
]


@torch.no_grad()
@pytest.mark.parametrize("changes", MODES)
def test_a_loaded_model_answers_by_the_runs_own_mode(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Student and teacher, each with its own weights, those of its head too."""
    recipe = recipe_in(tmp_path, input_size="12", **changes)
    teacher = away(recipe, seed=6)
    run, student = run_of(tmp_path / "run", recipe, teacher)
    images, answers = torch.randn(2, 1, 12, 12), []
    for which, own in (("student", student), ("teacher", teacher)):
        model, _ = load_weights(run, which)
        assert model.difficulty == recipe.question.name
        answers.append(model.predict_loss(images))
        assert torch.equal(answers[-1], own.predict_loss(images))
        if recipe.question.head:
            tokens = own.encode(images)[:, 1:]
            assert torch.equal(answers[-1], own.difficulty_head(tokens))
        elif recipe.question.name == "paper":
            assert torch.equal(answers[-1], own.predictor_on(own.decoder_tokens(own.encode(images)), 9))
    assert not torch.equal(*answers)
    assert has_teacher(next((run / "checkpoints").iterdir()))


@pytest.mark.parametrize("kinds", [("master", "ema"), ("master",)])
def test_a_checkpoint_to_resume_tells_whether_it_has_a_teacher(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    layout = {"optimizer_step": 1, "groups": [{"slots": {"student.w": [[5], 0, 0]}, "shards": 1, "index": 0}]}
    part = shards.Snapshot({f"0/{kind}": torch.zeros(5) for kind in kinds}, layout)
    (tmp_path / "shards").mkdir()
    shards.write(part, tmp_path / "shards" / "rank-00000.safetensors")
    assert has_teacher(tmp_path) == ("ema" in kinds)


@pytest.mark.parametrize("predict_loss", ["relative", "none"])
def test_a_start_from_a_run_with_a_head_or_without(tmp_path: Path, predict_loss: str) -> None:
    """The donor's head is taken, where both have one; else it is a fresh one, or left alone."""
    with_head: dict[str, Any] = {"difficulty": "in_place", "predict_loss": predict_loss}
    without = {**with_head, "difficulty": "paper", **({"mask_policy": "random"} if predict_loss == "none" else {})}
    for kind, changes in {"with": with_head, "without": without}.items():
        run_of(tmp_path / kind, recipe_in(tmp_path, **changes))
    for donor in ("with", "without"):
        given = load_weights(tmp_path / donor)[0].state_dict()
        for taker in (with_head, without):
            recipe = recipe_in(tmp_path, init_from=str(tmp_path / donor), **taker)
            found, fresh = weights.initial_model(recipe).state_dict(), model_of(recipe).state_dict()
            for name, value in found.items():
                assert torch.equal(value, given.get(name, fresh[name])), name
            assert any(name.startswith("difficulty_head.") for name in found) == (taker is with_head)


def test_load_weights(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    model, recipe = weights.load_weights(tmp_path)
    assert not model.training
    assert recipe.recipe == "debug"
    assert torch.equal(model.cls_token, load_file(folder / "student.safetensors")["cls_token"])
    untrained, _ = weights.load_weights(str(folder), "untrained")
    assert torch.equal(untrained.blocks[0].attn.qkv.weight, model_of(recipe).blocks[0].attn.qkv.weight)
    shutil.rmtree(folder / "shards")
    signed(folder)
    assert not has_teacher(folder)
    with pytest.raises(UserError, match="has no teacher weights; use --weights student"):
        weights.load_weights(folder, "teacher")
    with pytest.raises(UserError, match="holds no valid checkpoint"):
        weights.load_weights(tmp_path / "empty")


@pytest.mark.parametrize("folders", [(), ("checkpoints",), ("checkpoints/.aside-step-00000008/shards",)])
def test_a_run_that_has_saved_nothing_yet(tmp_path: Path, folders: tuple[str, ...]) -> None:
    """Its folder has the recipe, as a checkpoint has, and is none."""
    save_recipe(dataclasses.replace(recipes.debug(), save_every=7), tmp_path / "recipe.json")
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    for which in ("student", "teacher", "untrained"):
        with pytest.raises(UserError, match=r"saved no checkpoint yet; wait for the first \(save_every is 7 epochs\)"):
            weights.load_weights(tmp_path, which)


@pytest.mark.parametrize("named", ["run", "checkpoint"])
@pytest.mark.parametrize("spoilt", ["student.safetensors", "shards/part", "state.json", "manifest.json"])
def test_damaged_weights_are_never_taken(tmp_path: Path, named: str, spoilt: str) -> None:
    """Neither of a run nor of a checkpoint that is named itself, also not after it was whole and loaded."""
    folder = write(tmp_path, 1)
    source = tmp_path if named == "run" else folder
    weights.load_weights(source)
    content = bytearray((folder / spoilt).read_bytes())
    content[-1] ^= 1
    (folder / spoilt).write_bytes(content)
    problem = "missing or unreadable" if spoilt == "manifest.json" else f"{spoilt} does not match its hash"
    with pytest.raises(UserError, match=problem):
        weights.load_weights(source)


def test_a_checkpoint_that_has_lost_its_weights(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "student.safetensors").unlink()
    shutil.rmtree(folder / "shards")
    with pytest.raises(UserError, match="has lost its weights; copy the checkpoint again"):
        weights.load_weights(folder)


def test_no_run_starts_from_weights_that_are_not_finite(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path / "run", recipes.debug())
    (folder,) = (run / "checkpoints").iterdir()
    spoilt = load_file(folder / "student.safetensors")
    spoilt["norm.bias"][0] = float("nan")
    save_file(spoilt, folder / "student.safetensors")
    signed(folder)
    with pytest.raises(UserError, match=r"not finite: norm\.bias.* take another"):
        weights.initial_model(dataclasses.replace(recipes.debug(), init_from=str(folder)))


def test_the_run_of_a_checkpoint_and_what_nothing_may_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint may be named from within its folder, or by a link; one that was copied out has no run above it."""
    folder = write(tmp_path, 1)
    lone = shutil.copytree(folder, tmp_path / "elsewhere" / "copied")
    (tmp_path / "link").symlink_to(folder)
    assert weights.run_of(tmp_path / "link") == tmp_path.resolve()
    assert weights.run_of(lone) == lone
    assert lone in weights.saved_files(lone)
    monkeypatch.chdir(folder.parent)
    assert weights.run_of(Path(folder.name)) == weights.run_of(folder) == tmp_path
    assert tmp_path / "checkpoints" in weights.saved_files(tmp_path)
    assert {Path(folder.name), tmp_path / "checkpoints", tmp_path / "recipe.json"} <= {
        *weights.saved_files(Path(folder.name))
    }


@pytest.mark.parametrize("run", ["runs/a", ""])
@pytest.mark.parametrize("notes", TUNED)
def test_a_tuning_is_no_run_and_how_it_is_tested_is_said(tmp_path: Path, run: str, notes: str) -> None:
    folder = write(tmp_path, 1)
    (folder / notes).write_text(json.dumps({"run": run} if run else {}))
    words = f"or test it with fasthpm {Path(notes).stem} {run or 'RUN'} --evaluate --output_dir {tmp_path}"
    for source in (tmp_path, folder):
        with pytest.raises(UserError, match=f"^{source} holds {TUNED[notes]}; give the pretraining .*{words}$"):
            weights.checkpoint_of(source)


@pytest.mark.parametrize("notes", TUNED)
def test_no_pretraining_goes_on_from_a_tuning(tmp_path: Path, notes: str) -> None:
    folder = write(tmp_path / "ft", 1)
    (folder / notes).write_text("{}")
    for change, words in (
        (
            {"output_dir": str(tmp_path / "ft")},
            f"output_dir {tmp_path}/ft holds {TUNED[notes]}; choose another --output",
        ),
        ({"output_dir": str(tmp_path / "a"), "resume": str(folder)}, f"--resume {folder} holds {TUNED[notes]}; choose"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.compare_recipes(dataclasses.replace(recipes.debug(), **change), lambda _: {})
