"""The step with several views against plain loops: values, gradients, masks, keys, centres."""

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import schedule
from fasthpm.data import DatasetInfo, build_loader
from fasthpm.difficulty import DIFFICULTIES, HEAD
from fasthpm.errors import UserError
from fasthpm.mask import POLICIES as MASK_POLICIES
from fasthpm.mask_counts import COUNTED_POLICIES
from fasthpm.model import Crops
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.run.state import endless
from fasthpm.step import Step, StepOutput
from fasthpm.view_fields import ViewFields
from fasthpm.views import VIEW_METRICS, ViewStep, loss_across_views, step_of
from tests.helpers import reference_views as reference

INFO = DatasetInfo(64, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), ("a",))
S, V, LOCAL = 3, 2, 2
ELSEWHERE = ("uniform", "tube", "hpm_tube")  # masks that do not fit the recipe below anyway


def tiny(**changes: Any) -> Recipe:
    values = {
        "recipe": "tiny",
        "model": "ibot_vit_nano_patch4_28",
        "input_size": "16",
        "patch_size": 4,
        "target": "distributions",
        "predict_loss": "none",
        "mask_policy": "random",
        "mask_ratio": 0.3,
        "mask_ratio_spread": 0.2,
        "unmasked_share": 0.4,
        "global_crops": V,
        "local_crops": LOCAL,
        "local_size": 8,
        "prototypes": 12,
        "head_hidden": 16,
        "temperature_epochs": 2,
        "steps_per_epoch": 4,
        "batch_size": S,
        "epochs": 4,
        "warmup_epochs": 1,
        "seed": 3,
    }
    return Recipe(**values | changes)


def batch(seed: int = 0, samples: int = S) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (samples * V, 16, 16, 3), generator=generator, dtype=torch.uint8)
    local = torch.randint(0, 256, (samples * LOCAL, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return {"images": images, "ids": torch.arange(20, 20 + samples).repeat_interleave(V), "local": local}


def made(recipe: Recipe) -> ViewStep:
    """A step whose teacher is another model than its student."""
    step = step_of(model_of(recipe), recipe, INFO)
    assert isinstance(step, ViewStep)
    step.attach_teacher(model_of(dataclasses.replace(recipe, seed=99)).eval().requires_grad_(False))
    step.centres.values.copy_(torch.randn(2, recipe.prototypes, generator=torch.Generator().manual_seed(5)) / 10)
    return step


def run(step: ViewStep, update: int = 3, alpha: float = 0.5, **given: Tensor) -> StepOutput:
    inputs = batch() | given
    return step(
        inputs["images"],
        inputs["ids"],
        torch.tensor(update),
        torch.tensor(alpha, dtype=torch.float64),
        None,
        inputs["local"],
    )


def plain(step: ViewStep, mask: Tensor, update: int, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """cls and patch loss by loops over images, views and patches, from all logits of all tokens."""
    recipe, student, teacher = step.recipe, step.student, step._teacher[0]
    temperature = schedule.temperature_at(recipe, update)
    patches, small = (step.normalized_patches(given[name]) for name in ("images", "local"))
    with torch.no_grad():
        theirs = teacher.decoder_pred(teacher.encode(patches))
    ours = student.decoder_pred(student.encode_in_place(patches, mask))
    crops = student.decoder_pred(student.encode_in_place(small, grid=(2, 2))[:, 0])
    seen = torch.cat([ours[:, 0].unflatten(0, (-1, V)), crops.unflatten(0, (-1, LOCAL))], dim=1)
    cls = reference.cls_loss(seen, theirs[:, 0].unflatten(0, (-1, V)), step.centres.values[0], temperature)
    centre = step.centres.values[1]
    return cls, reference.patch_loss(ours[:, 1:], theirs[:, 1:], centre, temperature, mask)


@pytest.mark.parametrize("policy", ["random", "blockwise", "hpm"])
def test_losses_and_gradients_are_those_of_plain_loops(policy: str) -> None:
    """No gradient of the difficulty head's loss reaches anything but the head."""
    step = made(tiny(mask_policy=policy, difficulty="in_place" if policy == "hpm" else "paper"))
    found = run(step)
    assert found.mask.sum(1).min() == 0  # some images have none
    cls, patch = plain(step, found.mask, 3, batch())
    figures = dict(zip(VIEW_METRICS, found.metrics.tolist(), strict=True))
    assert figures["cls_loss"] == pytest.approx(float(cls.detach()), rel=1e-5)
    assert figures["patch_loss"] == pytest.approx(float(patch.detach()), rel=1e-5)
    weights = [weight for name, weight in step.student.named_parameters() if not name.startswith(HEAD)]
    ours = torch.autograd.grad(found.loss, weights)
    theirs = torch.autograd.grad(cls + patch, weights)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_centres_take_in_the_mean_of_all_teacher_logits() -> None:
    step = made(tiny())
    before = step.centres.values.clone()
    run(step)
    assert torch.equal(step.centres.values, before)  # not before the update is over
    step.end_update(True)
    teacher = step._teacher[0]
    logits = teacher.decoder_pred(teacher.encode(step.normalized_patches(batch()["images"])))
    wanted = torch.stack([logits[:, 0].mean(0), logits[:, 1:].mean((0, 1))])
    assert torch.allclose(step.centres.values, 0.9 * before + 0.1 * wanted, atol=1e-6)
    assert [*step.kept()] == ["centres"]


def test_an_update_that_is_left_out_moves_no_centre() -> None:
    step = made(tiny())
    before = step.centres.values.clone()
    run(step)
    step.end_update(False)
    assert torch.equal(step.centres.values, before)


def test_micro_steps_of_an_update_make_one_centre() -> None:
    whole, cut = made(tiny()), made(tiny())
    given = batch(samples=4)
    run(whole, **given)
    for half in range(2):
        rows, small = slice(4 * half, 4 * half + 4), slice(2 * LOCAL * half, 2 * LOCAL * (half + 1))
        run(cut, images=given["images"][rows], ids=given["ids"][rows], local=given["local"][small])
    for step in (whole, cut):
        step.end_update(True)
    assert torch.allclose(whole.centres.values, cut.centres.values, atol=1e-6)


def test_masks_are_of_update_sample_and_view_alone() -> None:
    step, given = made(tiny()), batch()
    mask = run(step).mask
    turned = {name: given[name].unflatten(0, (S, -1)).flip(0).flatten(0, 1) for name in given}
    assert torch.equal(run(step, **turned).mask.unflatten(0, (S, V)).flip(0).flatten(0, 1), mask)
    assert not torch.equal(run(step, update=4).mask, mask)
    many = made(tiny(unmasked_share=0.0))
    both = run(many).mask.unflatten(0, (S, V))
    assert not torch.equal(both[:, 0], both[:, 1])


def test_colours_change_the_pixels_and_nothing_else_that_is_drawn() -> None:
    bare, coloured = run(made(tiny())), run(made(tiny(view_augment="dino")))
    assert torch.equal(bare.mask, coloured.mask)
    assert not torch.equal(bare.loss, coloured.loss)
    assert torch.equal(run(made(tiny(view_augment="dino"))).loss, coloured.loss)


def test_hard_patches_are_masked_and_the_head_learns_to_rank() -> None:
    recipe = tiny(mask_policy="hpm", difficulty="in_place", unmasked_share=0.2)
    step = made(recipe)
    found = run(step, alpha=1.0)
    difficulty = step._teacher[0].predict_loss(step.normalized_patches(batch()["images"]))
    for row in range(S * V):
        count = int(found.mask[row].sum())
        hardest = difficulty[row].argsort(descending=True)[:count]
        assert set(hardest.tolist()) == set(found.mask[row].nonzero()[:, 0].tolist())
    figures = dict(zip(VIEW_METRICS, found.metrics.tolist(), strict=True))
    assert figures["difficulty_loss"] > 0
    found.loss.backward()
    head = step.student.difficulty_head
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in head.parameters())


def test_without_local_crops_the_two_views_are_compared() -> None:
    step = made(tiny(local_crops=0))
    given = batch()
    found = step(given["images"], given["ids"], torch.tensor(3), torch.tensor(0.0, dtype=torch.float64), None, None)
    assert found.loss.isfinite()


@pytest.mark.parametrize("update", [0, 3, 7, 8, 100])
def test_the_temperature_on_the_device_is_the_schedules(update: int) -> None:
    step = made(tiny())
    assert float(step.temperature(torch.tensor(update))) == pytest.approx(schedule.temperature_at(step.recipe, update))


def test_local_crops_are_encoded_with_interpolated_positions() -> None:
    step = made(tiny())
    model = step.student
    table = model.pos_embed[0, 1:].T.reshape(1, -1, 4, 4)
    wanted = torch.nn.functional.interpolate(table, (2, 2), mode="bicubic", align_corners=False)[0].flatten(1).T
    patches = step.normalized_patches(batch()["local"])
    tokens = torch.cat([(model.cls_token[0] + model.pos_embed[0, :1]).expand(len(patches), 1, -1)], 1)
    tokens = torch.cat([tokens, model.patch_embed(patches) + wanted], 1)
    for block in model.blocks:
        tokens = block(tokens)
    tokens = model.norm(tokens)
    assert torch.allclose(model.encode_in_place(patches, grid=(2, 2)), tokens, atol=1e-5)
    assert torch.allclose(model.encode_in_place(patches, grid=(2, 2), last=1)[:, 0], tokens[:, 0], atol=1e-5)


def test_masked_places_hold_the_mask_token_where_they_are() -> None:
    step = made(tiny())
    patches = step.normalized_patches(batch()["images"])
    mask = torch.zeros(len(patches), 16, dtype=torch.bool)
    mask[:, [3, 8]] = True
    changed = torch.where(mask[:, :, None], torch.randn_like(patches), patches)
    one, other = (step.student.encode_in_place(values, mask) for values in (patches, changed))
    assert torch.equal(one, other)
    crops = Crops(torch.tensor([[3, 8]]).expand(len(patches), -1), None)
    found = step.student(patches, mask, crops=crops)
    assert torch.allclose(found.patches, step.student.decoder_pred(one[:, 1:][:, [3, 8]]), atol=1e-5)


def test_all_pairs_of_other_views_are_compared() -> None:
    logits = torch.randn(S * V + S * LOCAL, 9, dtype=torch.float64)
    wanted = torch.randn(S * V, 9, dtype=torch.float64).softmax(1)
    seen = torch.cat([logits[: S * V].unflatten(0, (S, V)), logits[S * V :].unflatten(0, (S, LOCAL))], 1)
    zero = torch.zeros(9, dtype=torch.float64)
    loops = reference.cls_loss(seen, wanted.log().unflatten(0, (S, V)), zero, 1.0)
    assert float(loss_across_views(logits, wanted, V)) == pytest.approx(float(loops))


def test_recipes_of_one_view_have_the_other_step() -> None:
    from fasthpm import recipes

    recipe = recipes.debug()
    info = dataclasses.replace(INFO, channels=1, mean=(0.5,), std=(0.2,))
    step = step_of(model_of(recipe), recipe, info)
    assert type(step) is Step
    assert step.kept() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_size": 10}, "local_size 10 is not a multiple of patch_size 4; use e.g. --local_size 8"),
        ({"global_crops": 1}, "global_crops is 1, but views are compared"),
        ({"local_crops": 63}, "more than 64 views"),
        ({"model": "simmim_vit_nano_patch4_28"}, "use --model ibot_vit_nano_patch4_28"),
        ({"target": "pixels"}, "global_crops is 2, but target is pixels"),
        ({"mask_policy": "block"}, "mask_policy block masks one number of patches"),
        ({"mask_unit": 8}, "mask_unit is 8"),
        ({"mask_ratio_spread": 0.4}, "reaches beyond 0 to 1"),
        ({"mask_ratio": 0.05, "mask_ratio_spread": 0.0}, "masks none"),
        ({"mask_policy": "hpm", "difficulty": "measured"}, "--predict_loss none --difficulty in_place"),
        ({"predict_loss": "relative"}, "--predict_loss none --difficulty in_place"),
        ({"positions": "relative"}, "positions relative"),
        ({"temperature": 0.0}, "temperature is 0.0, expected more than 0"),
        ({"temperature_start": 1.5}, "temperature_start is 1.5, expected"),
        ({"crop_min": 0.5, "crop_max": 0.3}, "crop_max 0.3 is less than crop_min 0.5"),
        ({"local_crop_min": 0.5, "local_crop_max": 0.3}, "local_crop_max 0.3 is less than"),
        ({"centre_momentum": 1.0}, "centre_momentum is 1.0, expected"),
    ],
)
def test_what_cannot_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def table() -> list[dict[str, Any]]:
    """Models, masks, units, ways to ask, loss predictors and targets, whether or not they make sense together: all that
    have iBOT's model, or its target."""
    methods = [f"{name}_vit_nano_patch4_28" for name in ("ibot", "hpm", "mae", "simmim", "beit")]
    choices: dict[str, Any] = {
        "model": methods,
        "mask_policy": MASK_POLICIES,
        "mask_unit": (0, 8),
        "difficulty": DIFFICULTIES,
        "predict_loss": ("none", "relative"),
        "target": ("distributions", "pixels"),
    }
    rows = [dict(zip(choices, row, strict=True)) for row in itertools.product(*choices.values())]
    return [row for row in rows if row["target"] == "distributions" or row["model"].startswith("ibot")]


def complete(changes: dict[str, Any]) -> dict[str, Any]:
    """With no more fields of views than a target knows."""
    bare = {field.name: field.default for field in dataclasses.fields(ViewFields)}
    return changes if changes["target"] == "distributions" else {**bare, **changes}


def why_not(changes: dict[str, Any]) -> list[str]:
    """With what a row of the table may be refused, in part; [] if it makes sense as a recipe of several views."""
    ibot, views = changes["model"].startswith("ibot"), changes["target"] == "distributions"
    policy, asked = changes["mask_policy"], changes["difficulty"]
    in_encoder = not changes["model"].startswith(("hpm", "mae"))
    reasons = {
        "needs a projection head, which model": views and not ibot,
        "projects onto prototypes, but target is pixels": ibot and not views,
        "says what is hard; use --predict_loss none --difficulty in_place": changes["predict_loss"] != "none",
        "mask_policy": policy in ELSEWHERE,
        "masks one number of patches, and with several views": policy not in (*COUNTED_POLICIES, *ELSEWHERE),
        "use --mask_unit 0": changes["mask_unit"] == 8,
        "--difficulty in_place": policy.startswith("hpm") and asked != "in_place",
        "asks no teacher": asked == "in_place" and not policy.startswith("hpm"),
        "asks with mask tokens in the decoder": asked == "masked_query" and in_encoder,
    }
    return [reason for reason, holds in reasons.items() if holds]


def test_sensible_combinations_learn_and_the_others_are_refused() -> None:
    """One reason gives its message; where several hold, any, in one line. Of one view: see tests/test_step.py."""
    ran: list[dict[str, Any]] = []
    for changes in table():
        reasons = why_not(changes)
        if not reasons:
            found = run(made(tiny(**changes)))
            found.loss.backward()
            assert 0 < float(found.loss.detach()) < 100, changes
            ran.append(changes)
        else:
            with pytest.raises(UserError) as caught:
                tiny(**complete(changes))
            assert "\n" not in str(caught.value)
            assert len(reasons) > 1 or reasons[0] in str(caught.value), changes
    assert {one["mask_policy"] for one in ran} == set(COUNTED_POLICIES)
    assert {one["difficulty"] for one in ran} == {"paper", "measured", "in_place"}
    assert len(ran) == 6


def test_what_only_views_know_is_refused_without_them() -> None:
    with pytest.raises(UserError, match="freeze_last_layer_epochs is 1, but target pixels has no projection head"):
        Recipe(freeze_last_layer_epochs=1)
    with pytest.raises(UserError, match=r"unmasked_share is 0\.5, but target is pixels"):
        Recipe(unmasked_share=0.5)


@pytest.mark.parametrize(
    ("centred", "temperature", "low", "high"),
    [(True, 0.05, 0.2, 3.0), (False, 0.05, 0.0, 0.05), (True, 1.0, 3.45, 3.47)],
    ids=["sound", "no centre", "no sharpening"],
)
def test_a_broken_centre_collapses_and_is_seen(centred: bool, temperature: float, low: float, high: float) -> None:
    """Without centres every view has one prototype, entropy 0; without sharpening all alike, log 32."""
    steady = {"temperature_start": temperature, "temperature": temperature, "local_crops": 0, "steps_per_epoch": 99}
    recipe = tiny(prototypes=32, head_hidden=32, batch_size=8, **steady)
    loader = build_loader("synthetic:16", batch_size=8, image_size=(16, 16), channels=3, views=(2, 1), num_workers=1)
    step = step_of(model_of(recipe), recipe, INFO)
    teacher = copy.deepcopy(step.student).eval().requires_grad_(False)
    step.attach_teacher(teacher)
    optimizer = torch.optim.AdamW(step.student.parameters(), lr=1e-3)
    batches, none = endless(loader), torch.zeros((), dtype=torch.float64)
    for number in range(16):
        given = next(batches)
        output = step(given.images, given.ids, torch.tensor(number), none)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        step.end_update(centred)
        torch._foreach_lerp_(list(teacher.parameters()), [w.detach() for w in step.student.parameters()], 0.1)
    loader.close()
    figures = dict(zip(VIEW_METRICS, output.metrics.tolist(), strict=True))
    assert low <= figures["teacher_entropy"] <= high
    assert low <= figures["mean_entropy"] <= high


def test_a_compiled_step_has_the_same_loss() -> None:
    recipe = tiny(mask_policy="hpm", difficulty="in_place", view_augment="dino")
    plainly, compiled = made(recipe), made(recipe)
    compiled.compile_with("eager")
    assert torch.allclose(run(plainly).loss, run(compiled).loss, rtol=1e-5)
    assert not any(part.failure for part in (compiled.run_patches, compiled.run_teacher, compiled.run_student))
    plainly.end_update(True)
    compiled.end_update(True)  # trying the gradients first must not count twice
    assert torch.allclose(plainly.centres.values, compiled.centres.values, atol=1e-6)
