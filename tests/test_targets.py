"""Feature targets in the step and in a whole run."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from fasthpm import frozen
from fasthpm.data import DatasetInfo
from fasthpm.frozen import FrozenTeacher
from fasthpm.mask import split_ids
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.step import Step
from tests.helpers import reference
from tests.helpers.features import FAMILIES, images, small
from tests.helpers.launch import check_ranks

INFO = DatasetInfo(100, 3, (0.3, 0.4, 0.5), (0.2, 0.2, 0.2), ("a",))
ALPHA = torch.tensor(0.5, dtype=torch.float64)


def saved(vit: Any, path: Path, **wrapped: Any) -> str:
    """The ViT's weights in a file, in a dictionary of `wrapped` if there is any."""
    torch.save({key: vit.state_dict() for key in wrapped} or vit.state_dict(), path)
    return str(path)


# -------------------------------------------------------------------------------------------------- in the step
def step_with(recipe: Recipe) -> Step:
    """The recipe's step with its teachers."""
    step = Step(model_of(recipe), recipe, INFO)
    if recipe.uses_teacher:
        step.attach_teacher(model_of(dataclasses.replace(recipe, seed=1)).eval().requires_grad_(False))
    if recipe.target in FAMILIES:
        vit = frozen.create_vit(recipe, recipe.target_model, FAMILIES[recipe.target])
        step.attach_frozen(FrozenTeacher(vit, FAMILIES[recipe.target]).to(torch.bfloat16))
    return step


MAE = {"model": "mae_vit_nano_patch4_28", "mask_policy": "random", "predict_loss": "none"}
SIMMIM = {"model": "simmim_vit_nano_patch4_28", "predictor_depth": 1}


@pytest.mark.parametrize("method", [{}, MAE, SIMMIM], ids=["hpm", "mae", "hpm on simmim"])
@pytest.mark.parametrize("target", ["ema", "dino", "clip"])
def test_masked_patches_are_compared_with_the_teachers_features(target: str, method: dict[str, Any]) -> None:
    recipe = small(target, **method)
    step, pixels = step_with(recipe), images()
    output = step(pixels, torch.arange(3), torch.tensor(0), ALPHA)
    patches = step.normalized_patches(pixels)
    with torch.no_grad():
        features = step._teacher[0].encode(patches)[:, 1:] if target == "ema" else step._frozen[0](pixels)
        again = step.student(patches, output.mask, target=features)
        ids = split_ids(output.mask, recipe.num_masked)[1]
        chosen = torch.stack([row[places] for row, places in zip(features, ids, strict=True)]).float()
        want = reference.feature_losses(again.reconstruction.double(), chosen.double())
    torch.testing.assert_close(again.per_patch_loss.double(), want, atol=1e-4, rtol=1e-4)
    assert float(output.metrics[1]) == pytest.approx(float(want.mean()), abs=1e-4)
    output.loss.backward()
    assert all(p.grad is not None for p in step.parameters())
    assert all(name.startswith("student.") for name, _ in step.named_parameters())


@pytest.mark.parametrize("changes", [{}, MAE, {"mask_policy": "random"}], ids=["hpm", "mae", "random masks"])
def test_the_ema_teacher_runs_once(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One encoder pass gives features and difficulty; no pass of a predictor that nobody reads."""
    step = step_with(small("ema", **changes))
    calls: list[str] = []
    for name in ("_encode", "_difficulty"):
        original = getattr(HPMViT, name)

        def counted(self: HPMViT, *args: Any, _name: str = name, _original: Any = original, **options: Any) -> Tensor:
            if self is step._teacher[0]:
                calls.append(_name)
            result: Tensor = _original(self, *args, **options)
            return result

        monkeypatch.setattr(HPMViT, name, counted)
    step(images(), torch.arange(3), torch.tensor(0), ALPHA)
    assert calls == (["_encode", "_difficulty"] if not changes else ["_encode"])


def test_a_model_of_features_wants_them_and_one_of_pixels_does_not() -> None:
    features, pixels = model_of(small("ema")), model_of(small("pixels"))
    patches, mask = torch.randn(2, 16, 48), torch.arange(16).expand(2, -1) < 12
    with pytest.raises(ValueError, match="the target has 0 features per patch, the model predicts 128"):
        features(patches, mask)
    with pytest.raises(ValueError, match="the target has 128 features per patch, the model predicts 0"):
        pixels(patches, mask, target=torch.randn(2, 16, 128))


# -------------------------------------------------------------------------------------------------- a whole run
def test_a_run_on_dinos_features_pretrains_draws_and_exports(tmp_path: Path) -> None:
    weights = saved(timm.create_model("test_vit", img_size=64, num_classes=0), tmp_path / "dino.pth", model=1)
    output = tmp_path / "run"
    check_ranks(
        "fasthpm",
        "pretrain",
        "--recipe",
        "debug",
        "--input_size",
        64,
        "--patch_size",
        16,
        "--target",
        "dino",
        "--target_weights",
        weights,
        "--target_model",
        "test_vit",
        "--target_dim",
        64,
        "--epochs",
        1,
        "--steps_per_epoch",
        2,
        "--output_dir",
        output,
        launcher="forked",
        ranks=1,
    )
    assert (output / "encoder.safetensors").is_file()
    assert list((output / "panels").glob("*.png"))
