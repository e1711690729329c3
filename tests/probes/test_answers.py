"""How a run is asked what is hard: the best way that it has, the figure that belongs to it, and refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fasthpm import recipes
from fasthpm.checkpoint.weights import checkpoint_of, load_weights
from fasthpm.data.statistics import PixelStatistics
from fasthpm.difficulty import HEAD
from fasthpm.errors import UserError
from fasthpm.layers import DifficultyHead
from fasthpm.patches import model_of
from fasthpm.probes import difficulty_head, knn, result
from fasthpm.probes.answers import load_asked
from fasthpm.ranks import Launch
from fasthpm.recipe import Recipe
from tests.helpers.published import published, run_import
from tests.helpers.runs import away, run_of, signed

MAE: dict[str, Any] = {"mask_policy": "random", "predict_loss": "none"}
SIMMIM: dict[str, Any] = {**MAE, "model": "simmim_vit_nano_patch4_28"}
FIGURES = {"difficulty_spearman": 0.25, "difficulty_auc": 0.75}


def recipe_of(**changes: Any) -> Recipe:
    return dataclasses.replace(recipes.debug(), **{"input_size": "12", **changes})


def run_with(folder: Path, **changes: Any) -> Path:
    """A run of update 3, student and teacher, that has measured itself twice before and once after it."""
    recipe = recipe_of(**changes)
    run, _ = run_of(folder / "run", recipe, teacher=away(recipe, seed=6))
    lines = [{"step": 1, **FIGURES}, {"step": 2, "loss": 1.0}, {"step": 4, "difficulty_spearman": 0.9}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return run


def with_head(run: Path, **changes: Any) -> DifficultyHead:
    """A head beside a run, fitted on its teacher at update 3."""
    head = DifficultyHead(128)
    model = model_of(recipe_of())
    given: dict[str, Any] = {
        **difficulty_head.shape_of(model),
        "weights": "teacher",
        "step": 3,
        "updates": 5,
        "batch_size": 4,
        "data": "here.beton",
        "difficulty_spearman": 0.5,
        "difficulty_auc": 0.8,
        "others": {},
    }
    difficulty_head.keep(run, head, difficulty_head.HeadNotes(**{**given, **changes}))
    return head


@pytest.mark.parametrize(
    ("changes", "way", "own"),
    [
        ({}, "masked_query", "paper"),
        ({"decoder_attention": "cross"}, "masked_query", "masked_query"),
        ({"difficulty": "masked_query"}, "masked_query", "masked_query"),
        ({"difficulty": "measured"}, "measured", "measured"),
        ({"difficulty": "in_place"}, "in_place", "in_place"),
        (MAE, "measured", ""),
        ({**MAE, "difficulty": "measured"}, "measured", "measured"),
        (SIMMIM, "measured", ""),
        ({**SIMMIM, "predict_loss": "relative"}, "measured", "paper"),
        ({"target": "ema"}, "masked_query", "paper"),
    ],
)
def test_the_best_way_of_asking(tmp_path: Path, changes: dict[str, Any], way: str, own: str) -> None:
    """Its own, if it is not the paper's; and the figure that the run measured of itself belongs to its own alone."""
    run = run_with(tmp_path, **changes)
    model, _, found = load_asked(run)
    assert (found.way, found.own, found.weights, found.problem) == (way, own, "student", "")
    assert model.difficulty == way
    known = way == own
    assert (found.spearman, found.auc) == ((0.25, 0.75) if known else (None, None))
    assert (
        "difficulty_spearman 0.250, difficulty_auc 0.750 (the run's own measurement at update 1)" in found.line
    ) == known
    assert ("difficulty_spearman not measured" in found.line) == (not known)
    assert found.line.startswith(f"difficulty {way}")
    assert (f"(the run's own: {own or 'none'})" in found.line) == (not known)
    images = torch.randn(2, 1, 12, 12)
    same, _ = load_weights(run)
    same.difficulty = way
    with torch.no_grad():
        assert torch.equal(model.predict_loss(images), same.predict_loss(images))


def test_a_run_is_asked_as_one_likes(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    for way in ("paper", "masked_query", "measured"):
        for weights in ("student", "teacher"):
            model, _, found = load_asked(run, way, weights)
            assert (model.difficulty, found.way, found.weights) == (way, way, weights)
            assert torch.equal(model.cls_token, load_weights(run, weights)[0].cls_token)
    assert load_asked(run, "paper")[2].spearman == 0.25
    step = next((run / "checkpoints").iterdir())
    assert load_asked(step, "paper")[2].spearman == 0.25


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        (MAE, "paper", "difficulty paper needs a loss predictor, which this model lacks; expected measured"),
        (SIMMIM, "masked_query", "difficulty masked_query needs a loss predictor"),
        ({**SIMMIM, "predict_loss": "relative"}, "masked_query", "asks with mask tokens in the decoder, and those of"),
        (
            {"target": "ema"},
            "measured",
            "measures losses, and those of this model are of features, which nobody gives here; expected paper",
        ),
        ({}, "in_place", "needs a difficulty head.*; to fit a head: fasthpm maps RUN --fit_head 1000 --data_path SET"),
        ({}, "hardly", "difficulty is 'hardly', expected one of paper"),
    ],
)
def test_ways_that_a_run_does_not_have(tmp_path: Path, changes: dict[str, Any], asked: str, message: str) -> None:
    run = run_with(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_asked(run, asked)
    assert str(caught.value).startswith(f"{run}: difficulty")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("place", "name"), [("..", "step-00000003"), (".", "."), (".", "../step-00000003")])
def test_a_checkpoint_knows_its_run_from_within(
    place: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its name is given: the run's figures, costs and pixels, and the head that is kept beside it."""
    run = run_with(tmp_path)
    records = [{"step": 1, "images_per_second": 5.0, **FIGURES}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    (run / "versions.json").write_text(json.dumps({"world_size": 2}))
    save_file({"x": torch.zeros(1)}, run / "encoder.safetensors", {"mean": "[0.4]", "std": "[0.1]"})
    folder = checkpoint_of(run)
    monkeypatch.chdir(folder / place)
    launch = Launch(0, 0, 1, 1, torch.device("cpu"))
    with monkeypatch.context() as patched:
        patched.setattr(result, "gpu_hours", lambda records, batch, devices: [float(devices)])
        found = result.provenance(Path(name), launch)
        assert found["pretraining_gpu_hours"] == result.provenance(folder, launch)["pretraining_gpu_hours"] == 2.0
    model, _, asked = load_asked(Path(name), "paper")
    assert (asked.spearman, asked.auc) == (0.25, 0.75)
    assert model.pixels == PixelStatistics((0.4,), (0.1,))
    head = difficulty_head.fit_beside(Path(name), "synthetic:70", 1, weights="student", batch_size=4)
    assert (head.path, head.path.parent) == (run / difficulty_head.FILE, run)
    assert load_asked(Path(name), "in_place")[2].source.startswith("when difficulty_head.safetensors was fitted")


@pytest.mark.parametrize("text", ["", '{"step": 3', "[3]", '{"steps": 3}', None])
def test_a_checkpoint_without_its_position_is_told_before_the_work(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(tmp_path)
    state = checkpoint_of(run) / "state.json"
    state.unlink() if text is None else state.write_text(text)
    signed(state.parent)  # else it is damaged, whatever is in it

    def work(*_: object) -> None:
        raise RuntimeError("features were computed")

    monkeypatch.setattr(knn, "_side", work)
    monkeypatch.setattr(difficulty_head, "Fitting", work)
    message = rf"^{state} cannot be read \((No such file.*|it is damaged)\); copy the checkpoint again"
    for asked in (
        lambda: load_asked(state.parent),
        lambda: difficulty_head.fit_beside(state.parent, "synthetic:70", 1),
        lambda: knn.main([str(state.parent), "--train_path", "synthetic:48", "--val_path", "synthetic:21"]),
    ):
        with pytest.raises(UserError, match=message):
            asked()


def test_a_run_that_nobody_can_ask(tmp_path: Path) -> None:
    found = load_asked(run_with(tmp_path, **MAE, target="ema"))[2]
    assert (found.way, found.spearman) == ("", None)
    assert found.problem.startswith(
        "has no loss predictor, and its losses are of ema features; fit a head: fasthpm maps"
    )
    assert "no difficulty: the run has no loss predictor" in found.line
    alone = tmp_path / "alone"
    save_file(published(predictor=False), tmp_path / "mae.safetensors")
    run_import(tmp_path / "mae.safetensors", alone, "--encoder_only")
    found = load_asked(alone)[2]
    assert found.problem.startswith("was imported without its decoder")
    with pytest.raises(UserError, match="alone was imported without its decoder"):
        load_asked(alone, "measured")


# -------------------------------------------------------------------------------------------------- a head beside it
@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, MAE, {**MAE, "target": "ema"}])
def test_a_head_beside_the_run_answers_by_what_it_was_fitted_on(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = run_with(tmp_path, **changes)
    head = with_head(run)
    model, _, found = load_asked(run)
    assert (found.way, found.weights, found.spearman, found.auc) == ("in_place", "teacher", 0.5, 0.8)
    assert "when difficulty_head.safetensors was fitted, on samples held out of here.beton" in found.line
    images = torch.randn(2, 1, 12, 12)
    teacher, _ = load_weights(run, "teacher")
    torch.testing.assert_close(model.predict_loss(images), head(teacher.encode(images)[:, 1:]))
    assert load_asked(run, "in_place")[2] == found


def test_a_head_answers_only_where_the_run_has_no_better(tmp_path: Path) -> None:
    run = run_with(tmp_path, difficulty="masked_query")
    with_head(run)
    assert load_asked(run)[2].way == "masked_query"
    assert load_asked(run, "in_place")[2].spearman == 0.5
    own = run_with(tmp_path / "own", difficulty="in_place")
    with_head(own)
    model, _, found = load_asked(own, "in_place")
    assert (found.weights, found.spearman) == ("student", 0.25)
    assert torch.equal(model.difficulty_head.fc.weight, load_weights(own)[0].difficulty_head.fc.weight)


@pytest.mark.parametrize(
    ("others", "way"),
    [
        ({"paper": 0.9, "masked_query": 0.4, "measured": 0.9}, "in_place"),
        ({"paper": 0.1, "masked_query": 0.6, "measured": 0.1}, "masked_query"),
    ],
)
def test_a_head_that_agrees_less_than_what_comes_next_is_passed_over(
    tmp_path: Path, others: dict[str, float], way: str
) -> None:
    run = run_with(tmp_path)
    with_head(run, others=others)
    assert load_asked(run)[2].way == way
    assert load_asked(run, "in_place")[2].way == "in_place"


def test_a_head_of_another_time_or_other_weights_is_used_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path)
    with_head(run)
    load_asked(run)
    assert capsys.readouterr().err == ""
    load_asked(run, weights="student")
    line = f"{run / 'difficulty_head.safetensors'} was fitted on the teacher at update 3, and answers for the student"
    assert f"{line} at update 3" in capsys.readouterr().err
    with_head(run, step=1)
    assert load_asked(run)[2].way == "in_place"
    assert "was fitted on the teacher at update 1, and answers for the teacher at update 3" in capsys.readouterr().err


def test_a_head_of_another_encoder_is_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    with_head(run, grid=(1, 7, 7))
    with pytest.raises(UserError, match=r"difficulty_head.safetensors is of grid \(slots, rows, columns\) \(1, 7, 7\)"):
        load_asked(run)
    assert load_asked(run, "masked_query")[2].way == "masked_query"  # it is not looked at
    assert not hasattr(load_weights(run)[0], HEAD)
