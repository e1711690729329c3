"""Ways to ask what is hard: each against plain loops, what they refuse, and a head that learns and resumes.

Ranks run this file too (`main`): a run with a head under every ZeRO stage, in one go and resumed in the middle.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import difficulty, pretrain, recipes
from fasthpm.checkpoint.folder import compare_recipes, newest_valid
from fasthpm.checkpoint.shards import STATES, SavedState
from fasthpm.checkpoint.weights import load_weights
from fasthpm.cli import run_rank
from fasthpm.errors import UserError
from fasthpm.mask import num_masked, sample_noise
from fasthpm.model import HPMViT
from fasthpm.ranks import launch as ranks_launch
from fasthpm.recipe import load_recipe, recipe_text, science_of
from fasthpm.step import METRICS, Step
from tests.helpers.fast_modes import doubled
from tests.helpers.launch import ROOT, check_ranks
from tests.helpers.steps import ALPHA, NoSynchronisation, batch, step_of

SHAPES: dict[str, dict[str, Any]] = {
    "usual": {},
    "half": {"mask_ratio": 0.5},
    "few": {"mask_ratio": 0.3},
    "shared": {"predictor": "shared"},
    "narrow": {"predictor_dim": 16, "predictor_depth": 2},
    "video": {
        "model": "hpm_vit_nano_patch8_32_video",
        "input_size": "16",
        "num_frames": 4,
        "tubelet_size": 2,
        "mask_ratio": 0.6,
    },
}
STAGES = ("zero0_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16")  # ZeRO 3 last: it patches torch for good


def patches_for(model: HPMViT, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, model.num_patches, model.patch_dim, generator=generator, dtype=torch.float64)


def through(blocks: Any, tokens: Tensor) -> Tensor:
    for block in blocks:
        tokens = block(tokens)
    return tokens


# ------------------------------------------------------------------------------------------------- values
@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_query_is_what_the_plain_loop_says(shape: str) -> None:
    model = doubled(difficulty="masked_query", **SHAPES[shape])
    patches = patches_for(model)
    found = model.predict_loss(patches)
    prefix, length = model.num_prefix_tokens, model.num_patches
    visible = length - num_masked(length, model.mask_ratio)
    for row, image in enumerate(patches):
        encoded = model.decoder_embed(model.encode(image[None])) + model.decoder_pos_embed
        sequence = [encoded[:, place] for place in range(prefix)]
        for number in range(visible):
            place = number * length // visible + length // visible // 2
            sequence.append(encoded[:, prefix + place])
        for place in range(length):
            sequence.append(model.mask_token[:, 0] + model.decoder_pos_embed[:, prefix + place])
        tokens = torch.stack(sequence, dim=1)
        if model.predictor == "shared":
            tokens = through(model.decoder_blocks, tokens)
        hidden = through(model.decoder_blocks_losspred, model.decoder_embed_losspred(tokens))
        answers = model.decoder_pred_losspred(model.decoder_norm_losspred(hidden))[0, -length:]
        torch.testing.assert_close(found[row], answers)
    assert not torch.allclose(found, doubled(**SHAPES[shape]).predict_loss(patches))


@torch.no_grad()
@pytest.mark.parametrize("shape", ["usual", "half", "few", "video", "simmim", "units"])
def test_measured_is_the_loss_of_looks_in_which_patches_are_masked(shape: str) -> None:
    """Every patch is asked for once; the loop draws the windows by sorting, and the public forward has the losses."""
    special = {
        "simmim": {"model": "simmim_vit_nano_patch4_28", "pixel_loss": "l1", "predict_loss": "none"},
        "units": {"input_size": "32", "mask_unit": 8},
    }
    model = doubled(difficulty="measured", **(SHAPES | special)[shape])
    patches, noise = patches_for(model), torch.rand(3, model.num_patches)
    found = model.predict_loss(patches, noise=noise)
    units = squares(model)
    count = len(units)
    visible = count - num_masked(count, model.mask_ratio)
    looks = max(2, math.ceil(count / (count - visible)))
    for row, image in enumerate(patches):
        order = sorted(range(count), key=lambda unit: float(noise[row, unit]))
        for look in range(looks):
            first, last = look * count // looks, (look + 1) * count // looks
            window = [order[(first + place) % count] for place in range(count)]
            asked = window[visible : visible + last - first]
            rest = window[visible + last - first :]
            mask, thrown = (torch.zeros(1, model.num_patches, dtype=torch.bool) for _ in range(2))
            for unit in asked + (rest if model.encoder_mask_tokens else []):
                mask[0, units[unit]] = True
            for unit in [] if model.encoder_mask_tokens else rest:
                thrown[0, units[unit]] = True
            out = model(image[None], mask, thrown=thrown, num_thrown=int(thrown.sum()))
            losses = torch.zeros(model.num_patches, dtype=torch.float64)
            losses[mask[0]] = out.per_patch_loss[0]
            for unit in asked:
                torch.testing.assert_close(found[row, units[unit]], losses[units[unit]])


def squares(model: HPMViT) -> list[list[int]]:
    """The patches of every unit."""
    (rows, columns), unit = model.grid_size, model.mask_unit
    return [
        [(slot * rows + row * unit + r) * columns + column * unit + c for r in range(unit) for c in range(unit)]
        for slot in range(model.slots)
        for row in range(rows // unit)
        for column in range(columns // unit)
    ]


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize(("grid", "slots", "unit"), [((7, 7), 1, 1), ((4, 6), 3, 1), ((8, 8), 1, 2), ((6, 6), 1, 3)])
def test_looks_ask_for_every_patch_once(ratio: float, grid: tuple[int, int], slots: int, unit: int) -> None:
    length = slots * grid[0] * grid[1]
    with NoSynchronisation():
        looks = list(difficulty.views(torch.rand(5, length), grid, ratio, unit))
    asked = torch.cat([look.asked for look in looks], dim=1)
    assert asked.sort(dim=1).values.tolist() == [list(range(length))] * 5
    units = length // unit**2
    visible = (units - num_masked(units, ratio)) * unit**2
    for look in looks:
        assert look.visible.shape[1] == visible
        for seen, wanted, masked in zip(*(part.tolist() for part in look), strict=True):
            assert not set(seen) & set(masked)
            assert set(wanted) <= set(masked)
            assert len(seen) + len(masked) == length
    if visible * len(looks) <= length:
        together = torch.cat([look.visible for look in looks], dim=1)
        assert all(len(set(row)) == len(row) for row in together.tolist())


def test_there_are_two_looks_and_more_only_where_less_than_half_is_masked() -> None:
    """Two also where the student sees nothing at all."""
    for ratio, side, count in ((0.9, 10, 2), (0.75, 10, 2), (0.5, 10, 2), (0.4, 10, 3), (0.3, 10, 4), (0.9, 2, 2)):
        assert len(list(difficulty.views(torch.rand(1, side**2), (side, side), ratio))) == count


@torch.no_grad()
def test_in_place_reads_each_patch_by_itself() -> None:
    model = doubled(difficulty="in_place", mask_policy="hpm")
    patches = patches_for(model)
    found = model.predict_loss(patches)
    head = model.difficulty_head
    for row, image in enumerate(patches):
        for place, feature in enumerate(model.encode(image[None])[0, 1:]):
            centred = (feature - feature.mean()) / (feature.var(unbiased=False) + 1e-6).sqrt()
            hidden = head.fc.weight @ (centred * head.norm.weight + head.norm.bias) + head.fc.bias
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
            answer = float(head.pred.weight[0] @ hidden + head.pred.bias[0])
            assert float(found[row, place]) == pytest.approx(answer, rel=1e-6)


@torch.no_grad()
def test_cross_decoders_know_one_question() -> None:
    names = ("paper", "masked_query")
    models = [doubled(decoder_attention="cross", difficulty=name) for name in names]
    answers = [model.predict_loss(patches_for(model)) for model in models]
    assert torch.equal(*answers)
    assert [model.difficulty for model in models] == ["masked_query"] * 2


# ------------------------------------------------------------------------------------------------- the head learns
def test_the_heads_gradient_is_its_own() -> None:
    """The encoder gets MAE's gradient to the bit; the head that of the ranking of the student's losses, by loops."""
    step = step_of(difficulty="in_place", predict_loss="none", mask_policy="hpm")
    images, ids = batch()
    output = step(images, ids, torch.tensor(3), ALPHA)
    output.loss.backward()
    patches = step.normalized_patches(images)
    found = {name: weight.grad.clone() for name, weight in step.student.named_parameters() if weight.grad is not None}
    step.zero_grad()
    plain = step.student(patches, output.mask, num_masked=step.recipe.num_masked)
    plain.loss.backward()
    for name, weight in step.student.named_parameters():
        if name.startswith("difficulty_head"):
            assert weight.grad is None or not weight.grad.any()
        else:
            assert torch.equal(found[name], weight.grad), name  # type: ignore[arg-type]
    step.zero_grad()
    loss = pairs_by_loop(step, patches, output.mask, plain.per_patch_loss)
    assert float(output.metrics[METRICS.index("difficulty_loss")]) == pytest.approx(loss.item(), rel=1e-5)
    assert (output.loss - plain.loss).item() == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for name, weight in step.student.difficulty_head.named_parameters():
        torch.testing.assert_close(found[f"difficulty_head.{name}"], weight.grad, rtol=1e-3, atol=1e-6)


def test_the_difficulty_loss_is_the_predictors_and_the_heads() -> None:
    step = step_of(difficulty="in_place")
    output = step(*batch(), torch.tensor(3), ALPHA)
    found = dict(zip(METRICS, output.metrics.tolist(), strict=True))
    parts = found["reconstruction_loss"] + found["difficulty_loss"]
    assert found["loss"] == pytest.approx(parts, rel=1e-6) == pytest.approx(float(output.loss.detach()), rel=1e-6)
    assert found["difficulty_loss"] > 1  # about ln 2 each


def pairs_by_loop(step: Step, patches: Tensor, mask: Tensor, losses: Tensor) -> Tensor:
    """Mean over all pairs of masked patches of softplus(easier - harder), each patch with its own loss."""
    terms = []
    for image, hidden, actual in zip(patches, mask.tolist(), losses.tolist(), strict=True):
        features = step._teacher[0].encode(image[None])[0, 1:].detach()
        places = [place for place, masked in enumerate(hidden) if masked]
        answers = [step.student.difficulty_head(features[place][None, None])[0, 0] for place in places]
        for i in range(len(places)):
            for j in range(len(places)):
                if actual[i] > actual[j]:
                    terms.append(torch.nn.functional.softplus(answers[j] - answers[i]))
    return torch.stack(terms).mean()


def test_the_head_learns_which_patches_are_hard() -> None:
    """On a fixed batch; losses that are paired with other patches would be learnt as badly as noise."""
    step = step_of(difficulty="in_place", predict_loss="none", mask_policy="hpm")
    images, ids = batch(16)
    optimizer = torch.optim.AdamW(step.student.difficulty_head.parameters(), 3e-3)
    for update in range(60):
        output = step(images, ids, torch.tensor(update), torch.zeros_like(ALPHA))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        for mine, teachers in zip(
            step.student.difficulty_head.parameters(), step._teacher[0].difficulty_head.parameters(), strict=True
        ):
            teachers.data.copy_(mine.data)
    assert output.metrics[METRICS.index("teacher_spearman")] > 0.6


def test_with_kept_maps_the_head_learns_on_some_samples() -> None:
    fields = {"difficulty": "in_place", "predict_loss": "none", "teacher_maps": True, "map_refresh_epochs": 1}
    step = step_of(mask_policy="hpm", **fields)
    images, ids = batch(33)
    answer = step.ask_teachers(images, step.normalized_patches(images), ids, torch.tensor(3))
    assert answer.difficulty is None
    assert answer.tokens is not None
    assert len(answer.tokens) == 3  # of 33, one of 16
    output = step(images, ids, torch.tensor(3), ALPHA, torch.rand(33, 49))
    output.loss.backward()
    assert step.student.difficulty_head.fc.weight.grad is not None
    assert output.metrics[METRICS.index("difficulty_loss")] > 0


@pytest.mark.parametrize("name", ["masked_query", "in_place", "measured"])
def test_the_masks_follow_the_answer_without_waiting(name: str) -> None:
    step = step_of(difficulty=name)
    images, ids = batch()
    with NoSynchronisation():
        mask = step(images, ids, torch.tensor(3), ALPHA).mask
    answers = step.ask_teachers(images, step.normalized_patches(images), ids, torch.tensor(3)).difficulty
    assert answers is not None
    for row, values in zip(mask, answers, strict=True):
        assert row[values.argsort(descending=True)[: int(0.5 * step.recipe.num_masked)]].all()
    other = step.ask_teachers(images, step.normalized_patches(images), ids, torch.tensor(4)).difficulty
    assert torch.equal(answers, other) == (name != "measured")  # looks are drawn anew in every update


def test_looks_are_drawn_from_the_seed_and_apart_from_the_masks() -> None:
    step = step_of(difficulty="measured", seed=5)
    (images, ids), update = batch(), torch.tensor(3)
    noise = difficulty.view_noise(update, ids, 49, seed=5)
    assert torch.equal(
        step.ask_teachers(images, step.normalized_patches(images), ids, update).difficulty,
        step.difficulty(images, noise),
    )
    for masks in sample_noise(5, update, ids, 49):
        assert (masks != noise).float().mean() > 0.99


def test_the_other_weights_start_as_without_the_head() -> None:
    with_head, without = step_of(difficulty="in_place"), step_of()
    for name, weight in without.student.named_parameters():
        assert torch.equal(weight, with_head.student.get_parameter(name))


# ------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"difficulty": "in_place", "mask_policy": "random"}, "asks no teacher; use --mask_policy hpm"),
        ({"difficulty": "paper", "predict_loss": "none"}, "use --predict_loss relative, --difficulty in_place or"),
        ({"difficulty": "masked_query", "predict_loss": "none"}, "but predict_loss is none"),
        ({"difficulty": "masked_query", "model": "simmim_vit_base_patch16_224"}, "enter its encoder"),
        ({"difficulty": "measured", "teacher_scale": 2}, "sees images in full size, but teacher_scale is 2"),
        ({"difficulty": "in_place", "teacher_scale": 2}, "sees images in full size, but teacher_scale is 2"),
        ({"difficulty": "measure"}, "did you mean 'measured'?"),
        ({"difficulty_every": -1}, "difficulty_every is -1, expected 0 or more"),
    ],
)
def test_what_a_recipe_cannot_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(recipes.from_name("hpm_vit_base_in1k_200e"), **changes)
    assert message in str(caught.value)


def test_records_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="there is a difficulty paper already"):
        difficulty.register(difficulty.DIFFICULTIES["paper"])
    with pytest.raises(ValueError, match="read and look, or none"):
        difficulty.register(difficulty.Difficulty("nothing", "answers nothing"))


def test_runs_of_before_are_the_same_run(tmp_path: Path) -> None:
    """Their recipe.json has no such field; cross decoders have always been asked with mask tokens."""
    for fields, name in (({}, "paper"), ({"decoder_attention": "cross"}, "masked_query")):
        recipe = dataclasses.replace(recipes.debug(), output_dir=str(tmp_path), difficulty=name, **fields)
        old = json.loads(recipe_text(recipe))
        for field in ("difficulty", "difficulty_every", "val_path"):
            del old[field]
        (tmp_path / "recipe.json").write_text(json.dumps(old))
        (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True, exist_ok=True)  # else there is no past
        assert load_recipe(tmp_path / "recipe.json").question.name == name
        compare_recipes(recipe, science_of)
    with pytest.raises(UserError, match="difficulty 'masked_query', this one has 'measured'"):
        compare_recipes(dataclasses.replace(recipe, difficulty="measured"), science_of)


# ------------------------------------------------------------------------------------------------- runs with a head
def small(folder: Path, stage: str, **changes: Any) -> Any:
    """4 updates, a checkpoint after the first 2."""
    fields: dict[str, Any] = {
        "difficulty": "in_place",
        "predict_loss": "none",
        "model": "mae_vit_pico_patch4_28",
        "data_path": "synthetic:32",
        "batch_size": 16 // ranks_of(changes.pop("launch")),
        "ema_momentum": 0.9,
        "ema_momentum_end": 0.9,
        "epochs": 2,
        "warmup_epochs": 0.0,
        "log_every": 2,
        "save_every": 1,
        "panel_every": 0,
        "difficulty_every": 0,
        "output_dir": str(folder / stage),
        "deepspeed_config": str(ROOT / "ds_configs" / f"{stage}.json"),
    }
    return dataclasses.replace(recipes.debug(), **{**fields, **changes})


def ranks_of(launch: ranks_launch.Launch) -> int:
    return launch.world_size


def main() -> None:
    folder = Path(sys.argv[1])
    pretrain.measure_matmul_rate = lambda *_: 1.0
    pretrain.finish = lambda run: None
    with ranks_launch.session() as launch:
        for stage in STAGES:
            pretrain.pretrain(small(folder / "straight", stage, launch=launch), launch)
            pretrain.pretrain(small(folder / "broken", stage, launch=launch, stop_after=3), launch)
            pretrain.pretrain(small(folder / "broken", stage, launch=launch), launch)


@pytest.fixture(scope="module", params=[1, 2])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs on so many ranks, done once."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    check_ranks(Path(__file__), folder, launcher="forked", ranks=request.param, timeout=300)
    return folder


def state(run: Path) -> Iterator[tuple[str, Tensor]]:
    """Masters, moments and EMA of the newest checkpoint."""
    checkpoint = newest_valid(run, pytest.fail)
    assert checkpoint is not None
    saved = SavedState(checkpoint)
    for which in STATES:
        for name in saved.names:
            yield f"{which} {name}", saved.whole(which, name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_head_resumes_bit_for_bit_and_the_teacher_has_it_as_it_is(stage: str, runs: Path) -> None:
    straight, broken = (dict(state(runs / name / stage)) for name in ("straight", "broken"))
    assert straight.keys() == broken.keys()
    assert all(torch.equal(value, broken[name]) for name, value in straight.items())
    names = [name.removeprefix("master ") for name in straight if name.startswith("master ")]
    heads = [name for name in names if "difficulty_head" in name]
    assert len(heads) == 6
    for name in names:
        same = torch.equal(straight[f"master {name}"], straight[f"ema {name}"])
        assert same == (name in heads), name
    start = dict(load_weights(runs / "straight" / stage, "untrained")[0].named_parameters())
    assert not torch.equal(straight[f"master {heads[0]}"], start[heads[0].removeprefix("student.")])


if __name__ == "__main__":
    run_rank(lambda _: main())
