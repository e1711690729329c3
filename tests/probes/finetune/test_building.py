"""What a fine-tuning is built of, how it mixes, and whose an output folder is.

Nobody's without a checkpoint; its data is known by what it holds.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup

from fasthpm import recipes
from fasthpm.errors import UserError
from fasthpm.probes.finetune import building
from fasthpm.probes.finetune.building import KIND
from fasthpm.probes.finetune.settings import FineTune, stored
from fasthpm.ranks.launch import Launch
from fasthpm.tuning import past
from tests.helpers.runs import run_of, write

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


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_the_frames_of_a_clip_are_mixed_alike(cutmix: float) -> None:
    clips, labels = torch.randn(4, 3, 5, 8, 8), torch.tensor([0, 1, 2, 0])
    mix = Mixup(0.8 * (not cutmix), cutmix, label_smoothing=0.1, num_classes=3)
    np.random.seed(5)  # noqa: NPY002
    got, targets = building.mixed(mix, clips.clone(), labels)
    assert not torch.equal(got, clips)
    for t in range(5):
        np.random.seed(5)  # noqa: NPY002
        frames, same = mix(clips[:, :, t].clone(), labels)
        assert torch.equal(got[:, :, t], frames)
        assert torch.equal(targets, same)


def test_where_mixing_is_off_labels_are_smoothed() -> None:
    mix = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=4)
    mix.mixup_enabled = False
    images, labels = torch.randn(2, 1, 4, 4), torch.tensor([3, 0])
    got, targets = building.mixed(mix, images, labels)
    assert torch.equal(got, images)
    want = torch.tensor([[0.025, 0.025, 0.025, 0.925], [0.925, 0.025, 0.025, 0.025]])
    torch.testing.assert_close(targets.cpu(), want)


def refuse_other(folder: Path, ours: str, data: str) -> None:
    tuning, run = SimpleNamespace(output_dir=str(folder), resume="auto"), {"checkpoint_hash": ""}
    past.refuse_other(KIND, tuning, ours, data, run, stored)


def notes(**settings: Any) -> str:
    science = FineTune(**{"train_path": "train.beton", **settings}).science
    return json.dumps({"model": {"dim": 8}, "classes": ["a", "b"], "settings": science})


def leave(folder: Path, data: str | None, *, checkpoint: bool = True, **settings: Any) -> None:
    """What an interrupted fine-tuning left; `data`: None in the form from before it was kept."""
    folder.mkdir(exist_ok=True)
    (folder / "finetune.json").write_text(notes(**settings))
    if checkpoint:
        path = write(folder, 4) / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **({} if data is None else {"data": data})}))


def refusal(folder: Path, ours: str, data: str) -> str:
    with pytest.raises(UserError) as caught:
        refuse_other(folder, ours, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_a_checkpoint_has_no_past(tmp_path: Path) -> None:
    leave(tmp_path, None, checkpoint=False, epochs=3)
    (tmp_path / "checkpoints").mkdir()
    refuse_other(tmp_path, notes(epochs=5), "sha256:1")


def test_other_settings_are_refused_with_a_way_on(tmp_path: Path) -> None:
    leave(tmp_path, "sha256:1", epochs=3)
    said = refusal(tmp_path, notes(epochs=5), "sha256:1")
    assert "other settings (epochs 3, here 5)" in said
    assert f"--resume {tmp_path / 'checkpoints' / 'step-00000004'}" in said
    assert "--init_from" not in said  # which fine-tuning does not have


def test_the_data_is_what_it_holds_and_not_its_path(tmp_path: Path) -> None:
    leave(tmp_path, "sha256:1")
    refuse_other(tmp_path, notes(), "sha256:1")
    refuse_other(tmp_path, notes(train_path="moved.beton"), "sha256:1")
    assert "train_path train.beton is not what the fine-tuning in" in refusal(tmp_path, notes(), "sha256:2")
    assert "train_path 'train.beton', here 'moved.beton'" in refusal(
        tmp_path, notes(train_path="moved.beton"), "sha256:2"
    )


def test_a_fine_tuning_from_before_knows_the_path_alone(tmp_path: Path) -> None:
    leave(tmp_path, None)
    refuse_other(tmp_path, notes(), "sha256:1")
    assert "train_path 'train.beton'" in refusal(tmp_path, notes(train_path="moved.beton"), "sha256:1")


def test_checkpoints_of_another_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert "holds checkpoints of another kind" in refusal(tmp_path, notes(), "")
