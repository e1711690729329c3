"""The fused step: masks that depend on samples alone, a teacher that is only held, and no waiting for the device.

Ranks run this file too (`main`): combinations of baseline, mask, difficulty loss and target through the real engine.
"""

import dataclasses
import itertools
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fasthpm import loss, recipes
from fasthpm.cli import run_rank
from fasthpm.errors import UserError
from fasthpm.mask import POLICIES as MASK_POLICIES
from fasthpm.mask import split_ids
from fasthpm.patches import NormalizedPatches, model_of
from fasthpm.ranks import deepspeed_json, engine
from fasthpm.ranks import launch as ranks_launch
from fasthpm.recipe import Recipe
from fasthpm.recipe_fields import PREDICT_LOSSES
from fasthpm.step import HEALTH_SAMPLES, METRICS, Step, telling
from fasthpm.teacher import EMATeacher
from tests.helpers import reference
from tests.helpers.gpu_branches import gpu_branches
from tests.helpers.launch import ROOT, check_ranks
from tests.helpers.small_teachers import TARGETS
from tests.helpers.steps import ALPHA, INFO, NoSynchronisation, attach_frozen, batch, step_of


def test_pixels_are_normalised_and_cut_as_the_model_cuts_them() -> None:
    step = step_of()
    images, _ = batch()
    floats = ((images.float() / 255 - 0.3) / 0.2).permute(0, 3, 1, 2)
    torch.testing.assert_close(step.normalized_patches(images), step.student.patchify(floats))
    torch.testing.assert_close(step.normalized_patches(images)[2], reference.patches_of(floats[2], 4))
    assert step.normalized_patches(images[:0]).shape == (0, 49, 16)


@pytest.fixture(params=[nullcontext, gpu_branches], ids=["cpu", "gpu_branches"])
def branches(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a CPU does, and what a GPU does, on this CPU."""
    with request.param():
        yield


both_ways = pytest.mark.usefixtures("branches")


@both_ways
def test_the_hardest_patches_by_the_teacher_are_masked() -> None:
    step = step_of()
    images, ids = batch()
    mask = step(images, ids, torch.tensor(3), ALPHA).mask
    masked, hard = reference.mask_counts(49, 0.75, 0.5)
    assert (mask.sum(1) == masked).all()
    difficulty = step._teacher[0].predict_loss(step.normalized_patches(images))
    for row, values in zip(mask, difficulty, strict=True):
        assert row[values.argsort(descending=True)[:hard]].all()


def combinations() -> list[dict[str, Any]]:
    """Baselines, masks, units, difficulty losses and targets as recipe fields, whether or not they make sense
    together."""
    baselines = [
        {"model": "hpm_vit_pico_patch4_28"},
        {"model": "mae_vit_pico_patch4_28"},
        {"model": "simmim_vit_pico_patch4_28", "pixel_loss": "l1"},
        {"model": "beit_vit_pico_patch4_28", "positions": "learned", "drop_path": 0.1},
    ]
    objectives: list[dict[str, Any]] = [{"predict_loss": kind} for kind in PREDICT_LOSSES]
    objectives.append({"predict_loss": "absolute", "absolute_standardize": False})
    units = [{"mask_unit": 0}, {"mask_unit": 8}]
    targets: list[dict[str, Any]] = [{"target": "pixels"}]
    others: list[dict[str, Any]] = [{"target": "ema"}, {"target": "tokens", "target_dim": 5}, *TARGETS.values()]
    targets += [{"pixel_loss": "mse", **fields} for fields in others]
    policies = [{"mask_policy": policy} for policy in MASK_POLICIES]
    table = itertools.product(baselines, policies, units, objectives, targets)
    return [{key: value for part in parts for key, value in part.items()} for parts in table]


def why_not(changes: dict[str, Any]) -> str:
    """What a combination is refused with, in part; "" if it makes sense."""
    policy, predicts = changes["mask_policy"], changes["predict_loss"] != "none"
    if predicts and changes["model"].startswith("mae"):
        return "has no loss predictor; use --predict_loss none"
    if policy.startswith("hpm") and not predicts:
        return "follows predicted losses, but predict_loss is none"
    if changes["mask_unit"] and policy in ("block", "blockwise", "uniform", "tube", "hpm_tube"):
        return "does not mask in units; use --mask_unit 0"
    return "repeats one mask in every frame of a video" if policy in ("tube", "hpm_tube") else ""


def toy(changes: dict[str, Any]) -> Recipe:
    """The smallest recipe with these choices: 16 patches."""
    if changes["mask_policy"] == "attention":
        changes = {**changes, "mask_ratio": 0.5, "throw_ratio": 0.25}
    return dataclasses.replace(recipes.debug(), input_size="16", batch_size=2, **changes)


def main() -> None:
    """Three updates of every combination that makes sense, on each rank."""
    parser = ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--config", required=True)
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    sensible = [changes for changes in combinations() if not why_not(changes)][:: arguments.every]
    with ranks_launch.session() as launch:
        for changes in sensible:
            train_three(toy(changes).resolve(100, launch.world_size), arguments.config, launch)
        if launch.rank == 0:
            print(f"{len(sensible)} combinations ran")


def train_three(recipe: Recipe, config: str, launch: ranks_launch.Launch) -> None:
    """Three updates, and what must hold in each."""
    step = Step(model_of(recipe), recipe, INFO)
    merged = deepspeed_json.merge_config(config, recipe, launch.world_size)
    wrapped = engine.build_engine(step, recipe, merged, launch)
    attach_frozen(step)
    if recipe.uses_teacher:
        step.attach_teacher(EMATeacher(wrapped, step.student, "student.", model_of(recipe), 0.9).module)
    images, ids = batch(2, side=16)
    losses = []
    for update in range(3):
        weights = weights_of(recipe, 2) if update else None  # the first update has no maps yet
        plan = recipe.mask_plan if update else recipe.warmup_plan
        inputs = (x if x is None else x.to(launch.device) for x in (images, ids, torch.tensor(update), ALPHA, weights))
        output = wrapped(*inputs)
        wrapped.backward(output.loss)
        wrapped.step()
        losses.append(float(output.loss.detach()))
        assert output.mask.sum(1).tolist() == [plan.num_masked] * 2
    assert all(0 < value < 1000 for value in losses), (recipe, losses)
    assert len(set(losses)) == 3, (recipe, losses)


@pytest.mark.parametrize(("ranks", "preset", "every"), [(1, "zero1_bf16", 31), (2, "zero3_bf16", 71)])
def test_sensible_combinations_train_through_the_engine(ranks: int, preset: str, every: int) -> None:
    """Some of them on one rank and on two, every target among them; `--every 1` runs them all."""
    output = check_ranks(
        Path(__file__),
        *("--config", ROOT / "ds_configs" / f"{preset}.json", "--every", every),
        launcher="forked",
        ranks=ranks,
        timeout=400,
    )
    count = len([changes for changes in combinations() if not why_not(changes)][::every])
    assert f"{count} combinations ran" in output


def test_the_other_combinations_are_refused_with_a_reason() -> None:
    for changes in combinations():
        reason = why_not(changes)
        if reason:
            with pytest.raises(UserError) as caught:
                toy(changes)
            assert reason in str(caught.value)
            assert "\n" not in str(caught.value)
        else:
            assert toy(changes).num_masked > 0


POLICIES: dict[str, dict[str, Any]] = {
    "random": {"mask_policy": "random"},
    "hpm": {},
    "hpm-units": {"input_size": "32", "mask_unit": 8},
    "block": {"mask_policy": "block"},
    "blockwise": {"mask_policy": "blockwise"},
    "uniform": {"mask_policy": "uniform", "input_size": "32"},
    "simmim": {
        "model": "simmim_vit_nano_patch4_28",
        "mask_policy": "random",
        "input_size": "32",
        "mask_unit": 8,
        "predict_loss": "none",
        "pixel_loss": "l1",
    },
    "simmim-hpm": {"model": "simmim_vit_nano_patch4_28", "predictor_depth": 1, "pixel_loss": "l1"},
    "amt": {"mask_policy": "attention", "predict_loss": "none", "mask_ratio": 0.45, "throw_ratio": 0.4},
    "amt-hpm": {"mask_policy": "attention", "mask_ratio": 0.45, "throw_ratio": 0.4},
    "amt-simmim": {
        "model": "simmim_vit_nano_patch4_28",
        "mask_policy": "attention",
        "input_size": "32",
        "mask_unit": 8,
        "predict_loss": "none",
        "pixel_loss": "l1",
        "mask_ratio": 0.44,
        "throw_ratio": 0.26,
    },
    "mae-absolute": {"mask_policy": "random", "predict_loss": "absolute", "absolute_standardize": False},
    "hpm-ema": {"target": "ema"},
    "mae-clip": {"mask_policy": "random", "predict_loss": "none", **TARGETS["clip"]},
}


def weights_of(recipe: Recipe, count: int = 6) -> torch.Tensor | None:
    """Attention maps [count, L], if the recipe's masks follow them."""
    if not recipe.uses_maps:
        return None
    return torch.rand(count, recipe.num_patches, generator=torch.Generator().manual_seed(5))


@both_ways
@pytest.mark.parametrize("policy", POLICIES)
def test_a_samples_mask_does_not_depend_on_its_batch(policy: str) -> None:
    step = step_of(**POLICIES[policy])
    images, ids = batch(side=step.recipe.image_size[0])
    weights = weights_of(step.recipe)

    def mask_of(rows: slice, update: int) -> torch.Tensor:
        part = None if weights is None else weights[rows]
        return step(images[rows], ids[rows], torch.tensor(update), ALPHA, part).mask

    whole = mask_of(slice(None), 3)
    assert (whole.sum(1) == step.recipe.num_masked).all()
    parts = torch.cat([mask_of(slice(i, i + 2), 3) for i in (0, 2, 4)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, mask_of(slice(None), 4))


@both_ways
@pytest.mark.parametrize("policy", ["amt", "amt-hpm", "amt-simmim"])
def test_what_is_thrown_away_changes_nothing(policy: str) -> None:
    """Neither values nor gradients depend on the pixels of thrown patches; on all others they do."""
    step = step_of(**POLICIES[policy])
    plan, weights = step.recipe.mask_plan, weights_of(step.recipe)
    images, ids = batch(side=step.recipe.image_size[0])
    patches = step.normalized_patches(images)
    mask, thrown = step._sets(plan, ids, torch.tensor(3), ALPHA, weights)
    assert thrown is not None
    assert (thrown.sum(1) == plan.num_thrown).all()
    assert not (mask & thrown).any()

    def losses(pixels: torch.Tensor) -> list[torch.Tensor]:
        step.zero_grad()
        output = step.student(pixels, mask, num_masked=plan.num_masked, thrown=thrown, num_thrown=plan.num_thrown)
        output.loss.backward()
        return [output.loss, *(p.grad for p in step.student.parameters() if p.grad is not None)]

    with_noise = [
        torch.where(kind[:, :, None], torch.randn_like(patches), patches) for kind in (thrown, ~mask & ~thrown, mask)
    ]
    plain, other, visible, masked = (losses(pixels) for pixels in (patches, *with_noise))
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert plain[0] != visible[0]
    assert plain[0] != masked[0]


@both_ways
def test_before_the_first_maps_masks_are_random_and_nothing_is_thrown() -> None:
    step = step_of(**POLICIES["amt"])
    images, ids = batch()
    random = step_of(mask_policy="random", predict_loss="none")
    want = random(images, ids, torch.tensor(3), ALPHA)
    got = step(images, ids, torch.tensor(3), ALPHA)
    assert torch.equal(got.mask, want.mask)
    assert got.loss == want.loss


@both_ways
def test_the_easiest_policy_masks_the_other_end() -> None:
    step = step_of(mask_policy="hpm_easiest")
    images, ids = batch()
    mask = step(images, ids, torch.tensor(0), ALPHA).mask
    difficulty = step._teacher[0].predict_loss(step.normalized_patches(images))
    for row, values in zip(mask, difficulty, strict=True):
        assert row[values.argsort()[:18]].all()


def test_teacher_is_not_part_of_the_module() -> None:
    step = step_of()
    assert not [name for name, _ in step.named_parameters() if not name.startswith("student.")]
    assert sum(p.numel() for p in step.parameters()) == sum(p.numel() for p in step.student.parameters())


@both_ways
def test_mae_is_the_same_step_without_teacher_and_predictor() -> None:
    step = step_of(model="mae_vit_nano_patch4_28", mask_policy="random", predict_loss="none")
    output = step(*batch(), torch.tensor(0), ALPHA)
    metrics = dict(zip(METRICS, output.metrics.tolist(), strict=True))
    assert metrics["loss"] == metrics["reconstruction_loss"]
    assert metrics["difficulty_loss"] == 0
    assert (output.mask.sum(1) == 37).all()


@pytest.mark.parametrize(
    ("fields", "lacking"),
    [
        ({}, set()),
        ({"mask_policy": "random"}, {"teacher_spearman"}),
        ({"predict_loss": "none", "difficulty": "measured"}, {"spearman", "pair_accuracy", "difficulty_loss"}),
        ({"predict_loss": "none", "difficulty": "in_place"}, {"spearman", "pair_accuracy"}),
        ({"predict_loss": "none", "mask_policy": "random"}, set(METRICS) - {"loss", "reconstruction_loss"}),
    ],
)
def test_what_a_recipe_lacks_has_no_figures(fields: dict[str, Any], lacking: set[str]) -> None:
    recipe = dataclasses.replace(recipes.from_name("debug"), **fields)
    assert telling(recipe) == tuple(name for name in METRICS if name not in lacking)


@both_ways
def test_metrics_are_what_they_are_called() -> None:
    step = step_of()
    images, ids = batch()
    output = step(images, ids, torch.tensor(3), ALPHA)
    patches = step.normalized_patches(images)
    with torch.no_grad():
        again = step.student(patches, output.mask)
    want = {
        "loss": again.loss,
        "reconstruction_loss": again.reconstruction_loss,
        "spearman": reference.spearman(again.predicted_difficulty, again.per_patch_loss),
    }
    seen = step._teacher[0].predict_loss(patches).gather(1, split_ids(output.mask, 37)[1])
    want["teacher_spearman"] = loss.spearman(seen, again.per_patch_loss)
    got = dict(zip(METRICS, output.metrics.tolist(), strict=True))
    for name, value in want.items():
        assert got[name] == pytest.approx(float(value), abs=1e-5), name


def test_the_health_of_a_large_batch_is_that_of_its_first_samples() -> None:
    step = step_of()
    images, ids = batch(HEALTH_SAMPLES + 4)
    output = step(images, ids, torch.tensor(3), ALPHA)
    patches, maps = step.normalized_patches(images), torch.rand(len(images), 49)
    with torch.no_grad():
        again = step.student(patches, output.mask)
    seen = step._teacher[0].predict_loss(patches).gather(1, split_ids(output.mask, 37)[1])
    some = slice(HEALTH_SAMPLES)
    want = {
        "spearman": loss.spearman(again.predicted_difficulty[some], again.per_patch_loss[some]),
        "pair_accuracy": loss.pair_accuracy(again.predicted_difficulty[some], again.per_patch_loss[some]),
        "teacher_spearman": loss.spearman(seen[some], again.per_patch_loss[some]),
    }
    got = dict(zip(METRICS, output.metrics.tolist(), strict=True))
    for name, value in want.items():
        assert got[name] == pytest.approx(float(value), abs=1e-5), name
    assert torch.equal(step.map_spearman(images, maps), step.map_spearman(images[some], maps[some]))


@pytest.mark.parametrize("fields", [{}, {"target": "ema"}, {"difficulty": "in_place"}])
def test_pixels_are_normalised_once(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For the teacher and for the student."""
    calls, real = [], NormalizedPatches.__call__
    monkeypatch.setattr(NormalizedPatches, "__call__", lambda self, x: calls.append(x.shape) or real(self, x))
    images, ids = batch()
    step_of(**fields)(images, ids, torch.tensor(3), ALPHA)
    assert calls == [images.shape]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_never_waits_for_the_device(policy: str) -> None:
    step = step_of(**POLICIES[policy])
    images, ids = batch(side=step.recipe.image_size[0])
    update = torch.tensor(3)
    weights = weights_of(step.recipe)
    with NoSynchronisation():
        step(images, ids, update, ALPHA, weights).loss.backward()
    with pytest.raises(AssertionError, match="waits for the device"), NoSynchronisation():
        images[torch.ones(6, dtype=torch.bool)]


def test_weights_follow_the_seed_alone() -> None:
    recipe = recipes.debug()
    torch.manual_seed(123)
    one = model_of(recipe)
    torch.manual_seed(456)
    two = model_of(recipe)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = model_of(dataclasses.replace(recipe, seed=1))
    assert not torch.equal(one.cls_token, other.cls_token)


@both_ways
@pytest.mark.parametrize("policy", ["hpm", "simmim", "simmim-hpm", "amt-hpm"])
def test_gradients_reach_encoder_and_heads_but_no_teacher(policy: str) -> None:
    step = step_of(**POLICIES[policy])
    images, ids = batch(side=step.recipe.image_size[0])
    step(images, ids, torch.tensor(0), ALPHA, weights_of(step.recipe)).loss.backward()
    missing = [name for name, p in step.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad is None for teacher in step._teacher for p in teacher.parameters())


@both_ways
def test_hard_units_are_masked_as_a_whole() -> None:
    """The units of the highest mean difficulty, each with all of its patches."""
    step = step_of(**POLICIES["hpm-units"])
    images, ids = batch(side=32)
    mask = step(images, ids, torch.tensor(3), ALPHA).mask
    difficulty = step._teacher[0].predict_loss(step.normalized_patches(images)).tolist()
    for row, values in zip(mask, difficulty, strict=True):
        means = reference.unit_means(values, 8, 8, 2)
        hardest = sorted(range(16), key=lambda i: means[i])[-6:]  # int(12 * 0.5)
        assert all(row[patch] for patch in reference.in_units(set(hardest), 8, 8, 2))
        units = {patch // 8 // 2 * 4 + patch % 8 // 2 for patch in row.nonzero().flatten().tolist()}
        assert len(units) == 12


if __name__ == "__main__":
    run_rank(lambda _: main())
