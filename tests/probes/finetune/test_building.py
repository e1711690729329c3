"""What a fine-tuning is built of."""

import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasthpm import recipes
from fasthpm.probes.finetune import building
from fasthpm.probes.finetune.settings import FineTune
from fasthpm.ranks.launch import Launch
from tests.helpers.runs import run_of

LAUNCH = Launch(0, 0, 1, 1, torch.device("cpu"))
DATA = {"train_path": "synthetic:48", "val_path": "synthetic:21"}


def test_training_draws_and_steps_by_its_own_settings() -> None:
    """Not by those of the pretraining: its betas, its seed, whether it mirrors."""
    recipe = dataclasses.replace(recipes.debug(), beta2=0.95, flip=True)
    settings = FineTune(
        **DATA,
        seed=5,
        flip=False,
        crop_min=0.4,
        reprob=0.1,
        aa="",
        batch_size=8,
        global_batch_size=16,
        epochs=3,
        warmup_epochs=1.0,
    )
    plan, loader, val, last = building.open_data(settings, recipe, (28, 28), LAUNCH)
    assert (plan.beta1, plan.beta2) == (0.9, 0.999)
    assert (plan.global_batch_size, plan.accum_iter, plan.total_steps) == (16, 2, 9)
    drawn = loader.base.options
    assert (drawn.seed, drawn.flip, drawn.crop_min, drawn.train, drawn.accum_iter) == (5, False, 0.4, True, 2)
    assert not [step for step in loader.images.transform.transforms if "Flip" in type(step).__name__]
    assert last is val
    assert not val.options.train  # type: ignore[attr-defined]
    for each in (loader, val):
        each.close()


def test_average_and_groups_are_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = run_of(tmp_path / "run", dataclasses.replace(recipes.debug(), input_size="28"))
    seen: dict[str, Any] = {}

    def engine(step: Any, plan: Any, config: Any, launch: Any, groups: Any) -> Any:
        seen.update(groups=groups, betas=(plan.beta1, plan.beta2))
        return SimpleNamespace()

    def average(engine: Any, student: Any, prefix: str, module: Any, momentum: float) -> Any:
        seen.update(student=student, copy=module, prefix=prefix, momentum=momentum)
        return SimpleNamespace()

    monkeypatch.setattr(building.ranks, "build_engine", engine)
    monkeypatch.setattr(building, "EMATeacher", average)
    monkeypatch.setattr(building.zero, "MasterLayout", lambda engine: SimpleNamespace())
    monkeypatch.setattr(building.state, "resume", lambda run: None)
    given = {
        **DATA,
        "ema_decay": 0.9,
        "layer_decay": 0.5,
        "weight_decay": 0.3,
        "batch_size": 8,
        "global_batch_size": 16,
    }
    tuning = building.build(argparse.Namespace(run=run, preset="mae"), given, LAUNCH)
    assert (seen["momentum"], seen["prefix"], seen["betas"]) == (0.9, "vit.", (0.9, 0.999))
    assert seen["student"] is tuning.step.vit is not seen["copy"]
    assert {group["weight_decay"] for group in seen["groups"]} == {0.0, 0.3}
    assert {group["lr_scale"] for group in seen["groups"]} == {0.5**k for k in range(6)}
    assert torch.equal(tuning.step.vit.blocks[2].attn.qkv.weight, model.blocks[2].attn.qkv.weight)
    for loader in (tuning.loader, tuning.val_loader):
        loader.close()
