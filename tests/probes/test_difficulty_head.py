"""A head fitted on a frozen encoder: what it learns from, what it leaves alone, and the file that is kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasthpm import recipes
from fasthpm.data import DatasetInfo, build_loader, read_info
from fasthpm.errors import UserError
from fasthpm.layers import DifficultyHead
from fasthpm.mask import draw_mask, sample_noise
from fasthpm.patches import NormalizedPatches, model_of
from fasthpm.probes import difficulty_head
from fasthpm.probes.difficulty_head import Fitting, KeptHead
from fasthpm.recipe import Recipe
from fasthpm.run.difficulty_check import random_plan
from tests.helpers import reference
from tests.helpers.runs import away, run_of
from tests.helpers.videos import tiny

INFO = DatasetInfo(9, 1, (0.4,), (0.2,), ("a",))
SET = "synthetic:96"


def small(**changes: Any) -> Recipe:
    return dataclasses.replace(recipes.debug(), **{"input_size": "16", "data_path": SET, **changes})


def fitting(recipe: Recipe, batch_size: int = 16) -> Fitting:
    return Fitting(away(recipe), recipe, INFO, recipe.data_path, batch_size)


def batch_of(recipe: Recipe, count: int) -> Any:
    loader = build_loader(recipe.data_path, recipe.loader_options(batch_size=count))
    try:
        return next(iter(loader))
    finally:
        loader.close()


@pytest.mark.parametrize("changes", [{}, {"mask_policy": "random", "predict_loss": "none"}, {"target": "ema"}])
def test_the_loss_is_a_plain_loops(changes: dict[str, Any]) -> None:
    """Of the masked patches' answers, where each patch stands, against the loss that the model has there; samples held
    out are left out, and the gradient reaches the head alone."""
    recipe = small(**changes)
    fit, update = fitting(recipe), 7
    model, head, batch = fit.model.requires_grad_(True), fit.fresh(), batch_of(recipe, 80)
    loss = fit._loss(head, batch, update)
    loss.backward()
    kept = [row for row in range(80) if batch.ids[row] < 96 - difficulty_head.HELD_OUT]
    assert 0 < len(kept) < 80
    patches, ids = NormalizedPatches(recipe, INFO)(batch.images)[kept], batch.ids[kept]
    plan = random_plan(recipe)
    noise = sample_noise(recipe.seed, torch.tensor(update), ids, plan.noise_size)
    mask = draw_mask(plan, noise, torch.zeros(len(kept), 16), 0.0)
    with torch.no_grad():
        tokens = model.encode(patches)
        features = tokens[:, 1:] if recipe.target == "ema" else None
        actual = model(patches, mask, target=features).per_patch_loss
    answers: Tensor = torch.stack([head(tokens[row : row + 1, 1:])[0][mask[row]] for row in range(len(kept))])
    torch.testing.assert_close(loss, reference.ranking_loss(answers, actual), check_dtype=False)
    assert all(weight.grad is not None and weight.grad.any() for weight in (head.fc.weight, head.pred.weight))
    assert all(weight.grad is None for weight in model.parameters())


def test_a_head_learns_what_is_hard_and_is_measured_on_samples_held_out() -> None:
    recipe = small(data_path="synthetic:160")
    fit = fitting(recipe)
    head = fit.fresh()
    before = fit.measure(head)
    weights = {name: value.clone() for name, value in fit.model.state_dict().items()}
    fit.train(head, 40)
    after = fit.measure(head)
    assert after.keys() == {"difficulty_head", "paper", "masked_query", "measured"}
    assert after["difficulty_head"].difficulty_spearman > before["difficulty_head"].difficulty_spearman + 0.2
    assert after["difficulty_head"].difficulty_auc > before["difficulty_head"].difficulty_auc + 0.1
    assert {name: after[name] for name in ("paper", "measured")} == {
        name: before[name] for name in ("paper", "measured")
    }
    assert fit.model.difficulty == "paper"
    assert all(torch.equal(value, weights[name]) for name, value in fit.model.state_dict().items())
    assert [ids.tolist() for _, ids in fit._held_out()] == [list(range(s, s + 16)) for s in range(96, 160, 16)]
    again = fit.fresh()
    fit.train(again, 40)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in head.state_dict().items())


def test_figures_are_those_of_plain_loops() -> None:
    generator = torch.Generator().manual_seed(2)
    answers, true = (torch.randn(5, 8, generator=generator) for _ in range(2))
    found = difficulty_head.agreement(answers, true)
    pairs = [
        float(row[hard] > row[easy])
        for row, losses in zip(answers, true, strict=True)
        for hard in losses.argsort(descending=True)[:2]
        for easy in losses.argsort(descending=True)[2:]
    ]
    assert found.difficulty_spearman == pytest.approx(reference.spearman(answers, true), abs=1e-6)
    assert found.difficulty_auc == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_fitting_clips() -> None:
    """A head of a video model, whose grid has slots."""
    recipe = tiny(data_path="synthetic:72")
    fit = fitting(recipe, batch_size=8)
    head = fit.fresh()
    fit.train(head, 2)
    assert 0 <= fit.measure(head)["difficulty_head"].difficulty_auc <= 1
    assert difficulty_head.shape_of(fit.model)["grid"] == (4, 2, 2)


# -------------------------------------------------------------------------------------------------- the file
def fitted(tmp_path: Path, **changes: Any) -> tuple[Path, difficulty_head.HeadResult]:
    recipe = small(**changes)
    run, _ = run_of(tmp_path / "run", recipe, teacher=away(recipe, seed=6))
    return run, difficulty_head.fit_beside(run, SET, 2, batch_size=16)


def test_a_head_is_kept_beside_its_run_with_what_it_fits(tmp_path: Path) -> None:
    run, result = fitted(tmp_path)
    assert result.path == run / "difficulty_head.safetensors"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "difficulty_head.safetensors"]
    kept = difficulty_head.read(run)
    assert kept is not None
    notes = kept.notes
    assert (notes.width, notes.grid, notes.patch_size) == (128, (1, 4, 4), 4)
    assert (notes.weights, notes.step, notes.updates, notes.batch_size, notes.data) == ("teacher", 3, 2, 16, SET)
    assert (notes.difficulty_spearman, notes.difficulty_auc) == (result.difficulty_spearman, result.difficulty_auc)
    assert notes.others == result.others
    assert result.others.keys() == {"paper", "masked_query", "measured"}
    recipe = small()
    model = away(recipe, seed=6)
    difficulty_head.attach(model, kept)
    assert model.difficulty_head.fc.weight.equal(load_file(result.path)["fc.weight"])
    fit = Fitting(model, recipe, read_info(SET), SET, 16)
    assert fit.measure(model.difficulty_head)["difficulty_head"].difficulty_spearman == result.difficulty_spearman
    assert difficulty_head.fit_beside(run, SET, 1, weights="student", batch_size=16).path == result.path
    found = difficulty_head.read(run)
    assert found is not None
    assert found.notes.weights == "student"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 64}, r"is of width 64, and this run's is 128; remove it, and fit one: fasthpm maps RUN --fit_head"),
        ({"grid": (1, 7, 7)}, r"is of grid \(slots, rows, columns\) \(1, 7, 7\), and this run's is \(1, 4, 4\)"),
        ({"patch_size": 8}, "is of patch_size 8, and this run's is 4"),
    ],
)
def test_a_head_of_another_encoder_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model, head = model_of(small()), DifficultyHead(128)
    shape = difficulty_head.shape_of(model) | changes
    figures: dict[str, float] = {"difficulty_spearman": 0.5, "difficulty_auc": 0.5}
    notes = difficulty_head.HeadNotes(
        **shape, **figures, weights="teacher", step=3, updates=2, batch_size=4, data=SET, others={}
    )
    difficulty_head.keep(tmp_path, head, notes)
    kept = difficulty_head.read(tmp_path)
    assert kept is not None
    with pytest.raises(UserError, match=message) as caught:
        difficulty_head.attach(model, kept)
    assert str(caught.value).startswith(f"{tmp_path / 'difficulty_head.safetensors'} is of ")
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "difficulty_head")


def test_files_that_are_no_head_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "difficulty_head.safetensors"
    assert difficulty_head.read(tmp_path) is None
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        difficulty_head.read(tmp_path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="does not say what it fits; remove it"):
        difficulty_head.read(tmp_path)
    save_file({"a": torch.zeros(1)}, path, {"fasthpm_difficulty_head": json.dumps({"width": 3, "grid": [1]})})
    with pytest.raises(UserError, match="does not say what it fits; remove it"):
        difficulty_head.read(tmp_path)
    model = model_of(small())
    notes = difficulty_head.HeadNotes(
        **difficulty_head.shape_of(model),
        weights="teacher",
        step=3,
        updates=2,
        batch_size=4,
        data=SET,
        difficulty_spearman=0.0,
        difficulty_auc=0.5,
        others={},
    )
    with pytest.raises(UserError, match="holds other weights than a head's"):
        difficulty_head.attach(model, KeptHead(path, {"a": torch.zeros(1)}, notes))


def test_runs_and_sets_that_cannot_be_fitted_are_refused(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path / "run", small())
    with pytest.raises(
        UserError, match="data_path synthetic:79 has 79 samples, and fitting needs a batch of 16 and 64"
    ):
        difficulty_head.fit_beside(run, "synthetic:79", 2, batch_size=16)
    own, _ = run_of(tmp_path / "own", small(difficulty="in_place"))
    with pytest.raises(UserError, match="own has a difficulty head already, which learnt as it trained"):
        difficulty_head.fit_beside(own, SET, 2, batch_size=16)
    with pytest.raises(UserError, match="has no teacher weights"):
        difficulty_head.fit_beside(run, SET, 2, weights="teacher", batch_size=16)
    assert not list(tmp_path.glob("*/difficulty_head*"))
