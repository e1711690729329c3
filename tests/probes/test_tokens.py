"""Tokens that a classifier keeps, against plain loops."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fasthpm import recipes
from fasthpm.difficulty import ask_by
from fasthpm.errors import UserError
from fasthpm.probes.classifier import build_classifier
from fasthpm.probes.tokens import KeptTokens, TokenChooser, select_tokens
from tests.helpers.reference import selected_patches
from tests.helpers.runs import run_of


def test_selected_tokens_are_the_plain_loops() -> None:
    difficulty = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    difficulty[:, 3] = difficulty[:, 7]  # a tie
    for policy in ("easiest", "hardest"):
        found = select_tokens(difficulty, 5, policy=policy)
        assert found.tolist() == [selected_patches(row.tolist(), 5, policy) for row in difficulty]
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(12)
    for _ in range(400):
        chosen = select_tokens(difficulty, 0.25, policy="random", generator=generator)
        assert chosen.shape == (5, 3)
        assert (chosen.diff(dim=1) > 0).all()
        counts += torch.bincount(chosen.flatten(), minlength=12)
    assert counts.min() / counts.max() > 0.8
    tokens = torch.arange(13.0)[None, :, None].expand(2, -1, 4)
    kept = KeptTokens()
    assert torch.equal(kept(tokens), tokens)
    kept.ids = torch.tensor([[0, 2], [5, 11]])
    assert kept(tokens)[:, :, 0].tolist() == [[0, 1, 3], [0, 6, 12]]


@pytest.mark.parametrize(("keep", "policy"), [(0, "random"), (13, "hardest"), (1.5, "easiest"), (5, "hardly")])
def test_impossible_selections_are_refused(keep: float, policy: str) -> None:
    with pytest.raises(UserError, match="expected"):
        select_tokens(torch.zeros(1, 12), keep, policy=policy)


@torch.no_grad()
def test_tokens_are_chosen_by_the_best_way_that_the_run_has(tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipes.debug(), input_size="12")
    run, model = run_of(tmp_path / "run", recipe)
    vit, images = build_classifier(model, 3, image_size=(12, 12)), torch.randn(4, 1, 12, 12)
    chosen = {}
    for asked, way in (("auto", "masked_query"), ("paper", "paper"), ("measured", "measured")):
        chooser = TokenChooser(vit, "hardest", 0.34, run, torch.device("cpu"), asked)
        chooser.choose(images)
        ask_by(model, way)
        assert chooser.kept.ids is not None
        chosen[way] = chooser.kept.ids.tolist()
        assert chosen[way] == select_tokens(model.predict_loss(images), 3).tolist()
    assert len({str(ids) for ids in chosen.values()}) == 3
    silent = dataclasses.replace(recipe, mask_policy="random", predict_loss="none", target="ema")
    other, _ = run_of(tmp_path / "other", silent)
    with pytest.raises(UserError, match=r"difficulty_run .* has no loss predictor, and its losses are of ema features"):
        TokenChooser(vit, "hardest", 0.34, other, torch.device("cpu"))
