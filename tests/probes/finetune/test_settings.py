"""Presets of fine-tuning."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from fasthpm import recipes
from fasthpm.errors import UserError
from fasthpm.model import create_model
from fasthpm.probes.finetune import settings
from fasthpm.probes.finetune import settings as finetune_settings
from tests.helpers.runs import run_of
from tests.helpers.videos import small


def test_presets_follow_size_and_start() -> None:
    small = create_model("hpm_vit_nano_patch4_28")
    large = create_model("mae_vit_tiny_patch16_224")
    assert settings.preset("auto", small, False)["epochs"] == settings.SMALL["epochs"]
    assert settings.preset("auto", large, False) == {}
    assert settings.preset("mae", small, True) == {"layer_decay": 1.0}
    assert settings.FineTune().layer_decay == 0.65
    assert math.isclose(settings.FineTune().reprob, 0.25)
    with pytest.raises(UserError, match="batch_size is 7, and mixup and cutmix pair images"):
        settings.FineTune(batch_size=7)
    with pytest.raises(UserError, match=r"drop_path is 1\.5, expected"):
        settings.FineTune(drop_path=1.5)


def test_presets_of_videos_follow_the_run() -> None:
    with torch.device("meta"):
        base, large = (create_model(f"videomae_vit_{size}_patch16_224") for size in ("base", "large"))
    settings = {
        flip: finetune_settings.FineTune(**finetune_settings.preset("auto", base, False, flip))
        for flip in (True, False)
    }
    shown = [(s.epochs, s.blr, s.flip, s.frame_sampling, s.views) for s in settings.values()]
    assert shown == [(100, 1e-3, True, "dense", (5, 3)), (50, 5e-4, False, "segments", (2, 3))]
    for each in settings.values():
        assert (each.num_sample, each.aa, each.mixup, each.cutmix) == (2, "rand-m7-n4-mstd0.5-inc1", 0.8, 1.0)
        assert (each.smoothing, each.reprob, each.layer_decay, each.drop_path) == (0.1, 0.25, 0.75, 0.1)
        assert (each.global_batch_size, each.weight_decay) == (512, 0.05)
    assert finetune_settings.preset("auto", large, False, True)["epochs"] == 35
    assert finetune_settings.preset("auto", small(), False, False)["flip"] is False


def test_tokens_are_asked_for_in_a_way_that_is_settled_at_the_start(tmp_path: Path) -> None:
    """So that a head that is fitted later changes nothing; fine-tunings of earlier versions asked as the paper does."""
    run, _ = run_of(tmp_path / "run", dataclasses.replace(recipes.debug(), input_size="12"))
    base = finetune_settings.FineTune(token_policy="hardest")
    assert finetune_settings.complete(base, run).token_difficulty == "masked_query"
    measured = dataclasses.replace(base, token_difficulty="measured")
    assert finetune_settings.complete(measured, run).token_difficulty == "measured"
    assert finetune_settings.complete(dataclasses.replace(base, token_policy="random"), run).token_difficulty == ""
    assert finetune_settings.stored({"token_policy": "easiest", "lr": 2.0})["token_difficulty"] == "paper"
    assert finetune_settings.stored({"lr": 2.0}) == {**finetune_settings.FineTune().science, "lr": 2.0}
    assert finetune_settings.stored(measured.science) == measured.science
