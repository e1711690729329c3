"""The baselines compute what ours compute."""

import argparse
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import baselines, baselines_video, step
from bench import eager as bench_eager
from fasthpm import loss, recipes
from fasthpm.mask import random_mask
from fasthpm.patches import model_of


def same_weights(eager: baselines.EagerModel, ours: Any) -> None:
    """Give the baseline the weights of an `HPMViT`; its wide loss head gets equal rows."""
    names = {
        "positions": "pos_embed",
        "decoder_positions": "decoder_pos_embed",
        "cls_token": "cls_token",
        "mask_token": "mask_token",
    }
    state: dict[str, Tensor] = ours.state_dict()
    for key, value in eager.state_dict().items():
        name = names.get(key, key.replace("patch_embed.", "patch_embed.proj.").replace("mlp.0", "mlp.fc1"))
        name = name.replace("mlp.2", "mlp.fc2")
        for theirs, suffix in (("reconstructor", ""), ("predictor", "_losspred")):
            for part, own in (("blocks", "decoder_blocks"), ("norm", "decoder_norm"), ("head", "decoder_pred")):
                name = name.replace(f"{theirs}.{part}.", f"{own}{suffix}.")
        value.copy_(state[name].expand_as(value))


def test_the_eager_baseline_computes_the_same_losses() -> None:
    """Same weights, images and masks: a baseline that computed something else would prove nothing."""
    recipe = dataclasses.replace(recipes.debug(), decoder_depth=2)
    ours = model_of(recipe).double()
    eager = baselines.EagerHPM(ours, predicts=True).double()
    with torch.no_grad():
        same_weights(eager, ours)
    images, mask = torch.randn(3, 1, 28, 28, dtype=torch.float64), random_mask(torch.rand(3, 49), 0.75)
    wanted = ours(images, mask)
    reconstruction, difficulty = eager(images, mask)
    torch.testing.assert_close(reconstruction, wanted.reconstruction_loss)
    assert difficulty.item() == pytest.approx(wanted.difficulty_loss.item(), rel=1e-4)  # 1e-6 inside the logarithm
    everything = torch.zeros(3, 49, dtype=torch.bool)
    torch.testing.assert_close(eager.decode(images, everything)[1], ours.predict_loss(images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        baselines.ranking_loss_as_released(difficulty.new_ones(2, 5), torch.rand(2, 5)),
        torch.log(torch.tensor(2.0)),
        rtol=1e-4,
        atol=1e-4,
        check_dtype=False,
    )
    assert loss.ranking_loss(torch.rand(2, 5), torch.ones(2, 5)) == 0


def test_the_eager_baseline_of_clips_computes_the_same_losses() -> None:
    flags = argparse.Namespace(size="nano", video=True, batch_size=2)
    recipe = step.recipe_of("hpm", flags, step.CONFIGS["fp32"])
    ours = model_of(recipe).double()
    eager = baselines_video.EagerVideoHPM(ours, predicts=True).double()
    with torch.no_grad():
        same_weights(eager, ours)
    clips, noise = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64), torch.rand(4, 16)
    mask = random_mask(noise, 0.9).reshape(2, 32)  # each frame slot by itself
    wanted = ours(clips, mask)
    reconstruction, difficulty = eager(clips, mask)
    torch.testing.assert_close(reconstruction, wanted.reconstruction_loss, rtol=1e-4, atol=1e-6)  # eps of the target
    assert difficulty.item() == pytest.approx(wanted.difficulty_loss.item(), rel=1e-4)
    everything = torch.zeros(2, 32, dtype=torch.bool)
    torch.testing.assert_close(eager.decode(clips, everything)[1], ours.predict_loss(clips), rtol=1e-5, atol=1e-6)
    drawn = baselines_video.tubes(3, 2, 16, 0.9).reshape(3, 2, 16)
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    assert (drawn[:, 0].sum(1) == 14).all()
    update, model = bench_eager.eager_update(ours.float(), recipe, clips.float(), alpha=0.5, half=False)
    before = model.patch_embed.weight.detach().clone()
    update(0)
    assert not torch.equal(before, model.patch_embed.weight)
