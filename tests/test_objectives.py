"""Objectives: losses against loops, and every way to ask what is hard with each of them."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import loss as losses
from fasthpm.difficulty import DIFFICULTIES, views
from fasthpm.errors import UserError
from fasthpm.mask import split_ids
from fasthpm.model import HPMViT
from fasthpm.objectives import DISTRIBUTIONS, FEATURES, PIXELS, TOKENS, Objective
from fasthpm.speed import flops
from fasthpm.tokenizers import Codebook
from tests.helpers import reference
from tests.helpers.steps import ALPHA, batch, step_of
from tests.helpers.tokens import Brightness

SMALL: dict[str, Any] = {
    "img_size": 12,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_token_losses_are_cross_entropies(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7, dtype=dtype), torch.randint(0, 7, (2, 5))
    shares = torch.randn(2, 5, 7).softmax(dim=-1)
    fast = losses.token_loss(logits, ids), losses.distribution_loss(logits, shares)
    slow = reference.token_losses(logits, ids), reference.distribution_losses(logits, shares)
    for got, want in zip(fast, slow, strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    certain = torch.nn.functional.one_hot(ids, 7).double()
    torch.testing.assert_close(losses.distribution_loss(logits, certain).float(), fast[0].float())


def test_the_gradient_reaches_the_logits_alone() -> None:
    logits, shares = torch.randn(1, 3, 4, requires_grad=True), torch.rand(1, 3, 4, requires_grad=True)
    losses.distribution_loss(logits, shares).sum().backward()
    assert logits.grad is not None
    assert shares.grad is None


def targets_of(objective: Objective, count: int) -> Tensor | None:
    """Targets of `count` images of 9 patches."""
    if objective.name == "pixels":
        return None
    if objective.ids:
        return torch.randint(0, objective.width, (count, 9))
    return torch.randn(count, 9, objective.width).softmax(dim=-1)


OBJECTIVES = [PIXELS, FEATURES.as_wide_as(5), TOKENS.as_wide_as(6), DISTRIBUTIONS.as_wide_as(4)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.name)
@pytest.mark.parametrize("in_encoder", [False, True], ids=["decoder", "encoder"])
def test_the_loss_is_of_the_masked_patches_targets(objective: Objective, in_encoder: bool) -> None:
    torch.manual_seed(1)
    model = HPMViT(**SMALL, objective=objective, encoder_mask_tokens=in_encoder).double()
    images, mask = torch.randn(2, 1, 12, 12, dtype=torch.float64), torch.rand(2, 9).argsort(dim=1) < 4
    target = targets_of(objective, 2)
    output = model(images, mask, target=target)
    given = model.patchify(images) if target is None else target
    chosen = torch.stack([row[places] for row, places in zip(given, split_ids(mask, 4)[1], strict=True)])
    ways = {
        "pixels": lambda x, y: (x - y).square().mean(-1),
        "features": reference.feature_losses,
        "tokens": reference.token_losses,
        "distributions": reference.distribution_losses,
    }
    want = ways[objective.name](output.reconstruction, chosen)
    torch.testing.assert_close(output.per_patch_loss, want, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(output.difficulty_loss, losses.ranking_loss_plain(output.predicted_difficulty, want))


@pytest.mark.parametrize("objective", OBJECTIVES[1:], ids=lambda one: one.name)
def test_measured_difficulty_is_the_loss_of_any_objective(objective: Objective) -> None:
    """Each patch's loss in the look that masks it, by the same looks one at a time."""
    torch.manual_seed(2)
    model = HPMViT(**SMALL, objective=objective, difficulty="measured").double().eval()
    patches, noise = torch.randn(2, 9, 16, dtype=torch.float64), torch.rand(2, 9)
    target = targets_of(objective, 2)
    with torch.no_grad():
        got = model.predict_loss(patches, noise=noise, target=target)
        want = torch.zeros(2, 9, dtype=torch.float64)
        for view in views(noise, model.grid_size, model.mask_ratio):
            found = model.reconstruction_losses(patches, view.visible, view.asked, target)
            want.scatter_(1, view.asked, found.double())
    torch.testing.assert_close(got.double(), want)


@pytest.mark.parametrize(
    ("target", "problem"),
    [(None, "none"), (torch.zeros(1, 9), "float32"), (torch.zeros(1, 9, 6, dtype=torch.int64), "int64")],
)
def test_what_is_no_token_is_refused(target: Tensor | None, problem: str) -> None:
    with pytest.raises(ValueError, match=f"the targets are .*{problem}.* the model predicts 6 tokens"):
        TOKENS.as_wide_as(6).check(target)


# -------------------------------------------------------------------------------------------------- in the step
PLAIN = {"model": "beit_vit_nano_patch4_28", "target": "tokens", "predict_loss": "none", "mask_policy": "random"}
WAYS = ["paper", "masked_query", "in_place", "measured"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["hpm", "beit"])
@pytest.mark.parametrize("unit", [0, 8])
def test_tokens_with_every_difficulty(way: str, model: str, unit: int) -> None:
    if model == "beit" and way == "masked_query":
        return
    changes = {"predict_loss": "relative" if DIFFICULTIES[way].predictor else "none"}
    step = step_of(
        **{"model": f"{model}_vit_nano_patch4_28", "input_size": "16", "difficulty": way, "mask_unit": unit, **changes},
        target="tokens",
        target_dim=4,
        mask_ratio=0.5,
    )
    images, ids = batch(side=16)
    output = step(images, ids, torch.tensor(3), ALPHA)
    tokens = Brightness(4, 4)(images)
    with torch.no_grad():
        again = step.student(step.normalized_patches(images), output.mask, target=tokens)
    chosen = torch.stack([row[places] for row, places in zip(tokens, again.masked, strict=True)])
    want = reference.token_losses(again.reconstruction, chosen).mean()
    assert float(output.metrics[1]) == pytest.approx(float(want), rel=1e-4)
    output.loss.backward()
    assert all(weight.grad is not None for weight in step.parameters())


def test_measured_difficulty_of_ema_features_is_of_the_teachers_own() -> None:
    step = step_of(target="ema", difficulty="measured", predict_loss="none")
    images, ids = batch()
    patches = step.normalized_patches(images)
    with torch.no_grad():
        features = step._teacher[0].encode(patches)[:, 1:]
        want = step._teacher[0].predict_loss(patches, target=features)
        got = step.difficulty(images)
    torch.testing.assert_close(got, want)
    assert step.teach(patches, None).features is not None
    step(images, ids, torch.tensor(0), ALPHA)


def test_ids_that_the_model_does_not_know_are_refused() -> None:
    step = step_of(
        model="beit_vit_nano_patch4_28", target="tokens", target_dim=3, predict_loss="none", mask_policy="random"
    )
    step.attach_frozen(Brightness(4, 4))
    images, ids = batch()
    images[0] = 255
    with pytest.raises(UserError, match="gives ids 1 to 3, and the model predicts 3 tokens; use --target_dim 4"):
        step(images, ids, torch.tensor(0), ALPHA)


def test_the_tokenizer_runs_once_and_is_timed() -> None:
    step = step_of(
        model="beit_vit_nano_patch4_28", target="tokens", target_dim=4, predict_loss="none", mask_policy="random"
    )
    book = Brightness(4, 4)
    step.attach_frozen(book)
    step(*batch(), torch.tensor(0), ALPHA)
    assert book.calls == 1
    assert step.stopwatch.read() > 0
    assert dataclasses.replace(step.recipe, seed=1).frozen_dim == 4


@pytest.mark.parametrize("policy", ["random", "blockwise", "hpm"])
def test_a_tokenizer_that_reads_patches_alone_is_asked_about_the_masked_ones(policy: str) -> None:
    """The same loss and gradients as of the ids of all patches; where losses of all are measured, all are asked for."""
    asked: list[int] = []

    class Counted(Codebook):
        def ids(self, patches: Tensor) -> Tensor:
            asked.append(patches.shape[1])
            return super().ids(patches)

    class Whole(Codebook):
        by_patch = False

    for way in ("in_place", "measured") if policy == "hpm" else ("paper",):
        fields: dict[str, Any] = {
            "model": "beit_vit_nano_patch4_28",
            "mask_policy": policy,
            "difficulty": way,
            "predict_loss": "none",
        }
        step = step_of(**fields, target="tokens", target_weights="kmeans:x", target_dim=8, mask_ratio=0.38)
        codes = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        found = []
        for kind in (Counted, Whole):
            step.attach_frozen(kind(codes, 4, (0.3,), (0.2,)))
            step.zero_grad()
            output = step(*batch(), torch.tensor(3), ALPHA)
            output.loss.backward()
            grads = [p.grad for p in step.parameters() if p.grad is not None]
            found.append((output.metrics[:3], output.mask, torch.cat([grad.flatten() for grad in grads])))
        assert torch.equal(found[0][1], found[1][1])
        torch.testing.assert_close(found[0], found[1])
        assert asked == [49 if way == "measured" else step.recipe.num_masked]
        asked.clear()
        costs = [
            flops.step_flops(step.student, step.recipe, kind(codes, 4, (0.3,), (0.2,))) for kind in (Counted, Whole)
        ]
        saved = 0 if way == "measured" else 2 * 8 * 16 * (49 - step.recipe.num_masked)
        assert costs[1]["teacher"] - costs[0]["teacher"] == saved
