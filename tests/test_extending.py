"""A mask, a target, an export form and a recipe that the package does not know: one entry each, used for real."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fasthpm import mask, recipes, targets
from fasthpm.errors import UserError
from fasthpm.exchange import exporting, forms
from fasthpm.pretrain import parse_arguments
from fasthpm.recipe import Recipe
from fasthpm.run.records import read_metrics
from fasthpm.step import Step
from tests.helpers import additions
from tests.helpers.launch import check_ranks
from tests.helpers.steps import ALPHA, NoSynchronisation, batch, step_of

REGISTRIES = (mask.POLICIES, targets.TARGETS, forms.FORMS, recipes.RECIPES)
RUN = (
    *("--model", "hpm_vit_pico_patch4_28", "--data_path", "synthetic:64", "--epochs", 1, "--warmup_epochs", 0),
    *("--batch_size", 8, "--log_every", 2),
)


@pytest.fixture
def added() -> Iterator[None]:
    """The additions, for one test."""
    before = [dict(registry) for registry in REGISTRIES]  # type: ignore[call-overload]
    additions.add()
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()  # type: ignore[attr-defined]
        registry.update(entries)  # type: ignore[attr-defined]


def rows_step(**changes: object) -> Step:
    """The step of the added recipe, with its teachers."""
    step = step_of(mask_policy="rows", target="statistics", **changes)
    step.attach_frozen(additions.Statistics(step.recipe, torch.device("cpu"), torch.float32))
    return step


def test_a_run_and_an_export_with_all_four(tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = check_ranks(
        additions.__file__, "pretrain", "--recipe", "hpm_rows", *RUN, "--output_dir", run, launcher="forked"
    )
    assert "finished 4 of 4 updates" in output
    records = read_metrics(run)
    assert [record["step"] for record in records] == [2, 4]
    assert 0 < records[-1]["reconstruction_loss"] < 1  # of means and deviations, not of pixels
    assert (run / "panels" / "step-00000004.png").stat().st_size > 0
    arrays = tmp_path / "encoder.npz"
    told = check_ranks(additions.__file__, "export", run, "--format", "numpy", "-o", arrays, ranks=1, launcher="forked")
    assert "numpy agrees within" in told
    assert f'load it with: numpy.load("{arrays}")' in told
    with np.load(arrays) as file:
        assert file["blocks.3.mlp.fc2.weight"].shape == (32, 128)


@pytest.mark.usefixtures("added")
def test_the_added_mask_is_drawn_by_the_step() -> None:
    """Whole rows, the hardest by the teacher among them, without waiting for the device."""
    step = rows_step()
    images, ids = batch()
    with NoSynchronisation():
        output = step(images, ids, torch.tensor(3), ALPHA)
    rows = output.mask.reshape(6, 7, 7)
    assert torch.equal(rows, rows[:, :, :1].expand_as(rows))
    assert output.mask.sum(1).tolist() == [step.recipe.num_masked] * 6 == [42] * 6
    difficulty = step.difficulty(images).reshape(6, 7, 7).mean(2)
    for masked, values in zip(rows[:, :, 0], difficulty, strict=True):
        assert masked[values.argsort(descending=True)[:3]].all()  # int(6 * 0.5)


@pytest.mark.usefixtures("added")
def test_the_added_target_is_what_the_student_learns() -> None:
    step = rows_step()
    images, ids = batch()
    output = step(images, ids, torch.tensor(3), ALPHA)
    cut = images.reshape(6, 7, 4, 7, 4).permute(0, 1, 3, 2, 4).reshape(6, 49, 16).float() / 255
    features = torch.stack([cut.mean(2), cut.std(2)], dim=2)
    with torch.no_grad():
        again = step.student(step.normalized_patches(images), output.mask, target=features)
    assert step.student.objective.width == again.reconstruction.shape[-1] == 2
    chosen = features[output.mask].reshape(again.reconstruction.shape)
    want = torch.nn.functional.smooth_l1_loss(again.reconstruction, chosen)
    torch.testing.assert_close(output.metrics[1], want)


@pytest.mark.usefixtures("added")
def test_a_target_by_the_teacher_of_the_run_is_a_loss_alone() -> None:
    targets.register(targets.Target("ema_l1", "the EMA teacher's, by smooth L1", "ema", loss=additions.smooth_l1))
    step = step_of(target="ema_l1")
    images, ids = batch()
    output = step(images, ids, torch.tensor(3), ALPHA)
    patches = step.normalized_patches(images)
    features = step.teach(patches).features
    with torch.no_grad():
        again = step.student(patches, output.mask, target=features)
    assert features is not None
    chosen = features[output.mask].reshape(again.reconstruction.shape)
    torch.testing.assert_close(output.metrics[1], additions.smooth_l1(again.reconstruction, chosen).mean())


@pytest.mark.usefixtures("added")
def test_the_compiled_step_takes_them() -> None:
    eager, compiled = rows_step(), rows_step()
    compiled.compile_with("aot_eager")
    arguments = (*batch(), torch.tensor(3), ALPHA)
    torch.testing.assert_close(compiled(*arguments).metrics, eager(*arguments).metrics, rtol=1e-5, atol=1e-6)
    assert not compiled.run_student.failure  # type: ignore[attr-defined]


@pytest.mark.usefixtures("added")
def test_flags_and_checks_know_them(tmp_path: Path) -> None:
    flags = ["--recipe", "debug", "--data_path", "synthetic:64", "--output_dir", str(tmp_path)]
    assert parse_arguments([*flags, "--mask_policy", "rows"]).masks_by_difficulty
    assert parse_arguments([*flags, "--recipe", "hpm_rows"]).target == "statistics"
    assert parse_arguments([*flags, "--target", "statistics", "--mask_policy", "random"]).frozen_dim == 2
    with pytest.raises(UserError, match=r"mask_policy is 'row', expected one of random, hpm, .*rows; did you mean"):
        parse_arguments([*flags, "--mask_policy", "row"])
    with pytest.raises(UserError, match="mask_policy rows follows predicted losses, but predict_loss is none"):
        parse_arguments([*flags, "--mask_policy", "rows", "--predict_loss", "none"])
    with pytest.raises(UserError, match="mask_policy rows does not mask in units"):
        parse_arguments([*flags, "--mask_policy", "rows", "--mask_unit", "16"])


def test_without_their_entries_they_are_unknown() -> None:
    with pytest.raises(UserError, match="mask_policy is 'rows', expected one of random"):
        dataclasses.replace(recipes.debug(), mask_policy="rows")
    with pytest.raises(UserError, match="target is 'statistics', expected one of pixels, ema, dino, clip"):
        Recipe(target="statistics")
    with pytest.raises(UserError, match="unknown format 'numpi'; expected one of timm, torchvision"):
        exporting.named_form("numpi")


@pytest.mark.usefixtures("added")
def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="there is a mask policy rows already"):
        additions.add()
    with pytest.raises(ValueError, match="there is a target statistics already"):
        targets.register(targets.TARGETS["statistics"])
    with pytest.raises(ValueError, match="there is a form 'numpy' already"):
        forms.register(additions.Numpy())
    with pytest.raises(ValueError, match="there is a recipe hpm_rows already"):
        recipes.recipe(additions.hpm_rows)


def test_entries_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="neither family nor build"):
        targets.register(targets.Target("nobody", "no teacher"))
    with pytest.raises(ValueError, match="has teacher 'emma', expected one of"):
        targets.register(targets.Target("emma", "misspelt", teacher="emma"))
    with pytest.raises(ValueError, match="follows 'loss'; expected difficulty, attention or ''"):
        mask.register("losses", "misnamed", follows="loss")(additions.draw_rows)
    with pytest.raises(TypeError):
        mask.register("odd", "a fact that is none", draws=3)(additions.draw_rows)


def test_every_entry_says_what_it_is() -> None:
    for records in (mask.POLICIES.values(), targets.TARGETS.values(), forms.FORMS.values()):
        assert all(record.summary and "\n" not in record.summary for record in records)  # type: ignore[attr-defined]
    assert all(function.__doc__ for function in recipes.RECIPES.values())
