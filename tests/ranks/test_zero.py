"""How ZeRO lays out the masters that the teacher follows; and an update without waits, as GPUs take it, against
DeepSpeed's own (on a CPU, whose fused AdamW does the same)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasthpm.errors import UserError
from fasthpm.ranks import deepspeed_json, engine, zero
from fasthpm.ranks import launch as ranks_launch
from fasthpm.ranks.zero import (
    Group,
    MasterLayout,
    Slot,
    _common_elements,
    add_gradients_at_once,
    full_state,
    update_without_waits,
)
from fasthpm.recipe import Recipe
from fasthpm.teacher import EMATeacher
from tests.helpers.layouts import KINDS, group_of, padded

STATES = ("master", "ema", "exp_avg", "exp_avg_sq")
PRESETS = ("zero1_bf16", "zero2_bf16")  # that have an update without waits
States = dict[str, dict[str, Tensor]]


@pytest.mark.parametrize("stage", range(4))
def test_an_unknown_deepspeed_is_one_clear_error(stage: int) -> None:
    changed = SimpleNamespace(
        basic_optimizer=torch.optim.AdamW([torch.zeros(1)]),
        optimizer=SimpleNamespace(),
        module=nn.Linear(1, 1),
        seq_data_parallel_group=None,
        zero_optimization_stage=lambda: stage,
    )
    with pytest.raises(UserError, match=r"deepspeed .* keeps its master weights differently .* constraints\.txt"):
        MasterLayout(changed)


@pytest.mark.parametrize(("rank", "known"), [(0, [1.0, 2.0]), (1, [3.0])])
def test_padding_behind_a_parameter_is_not_compared(rank: int, known: list[float]) -> None:
    """ZeRO 3 leaves it uninitialised, and it may well read as NaN."""
    stripe = torch.tensor([*known, *[float("nan")] * (2 - len(known))])
    group = Group(stripe, torch.float32, (Slot("w", torch.Size([3]), 0, 2),), shards=2, index=rank)
    weight = nn.Parameter(torch.zeros(3))
    weight.ds_tensor = stripe.clone()  # type: ignore[attr-defined]
    assert torch.equal(*_common_elements(group, group.slots[0], stripe, weight))
    weight.ds_tensor[0] += 1  # type: ignore[attr-defined]
    assert not torch.equal(*_common_elements(group, group.slots[0], stripe, weight))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_shard_claims_to_hold_is_compared_with_the_weights(kind: str, world: int) -> None:
    """Every element of every parameter by exactly one rank, wherever it lies."""
    values = {"a": torch.arange(15.0).reshape(3, 5), "b": torch.arange(20.0, 27), "c": torch.arange(30.0, 31)}
    compared: dict[str, list[float]] = {name: [] for name in values}
    for rank in range(world):
        group = group_of(values, kind, world, rank)
        for slot in group.slots:
            weight = nn.Parameter(values[slot.name].clone())
            weight.ds_tensor = padded(weight, world)[rank]  # type: ignore[attr-defined]
            ours, theirs = _common_elements(group, slot, group.master, weight)
            assert torch.equal(ours, theirs)
            compared[slot.name] += theirs.tolist()
    assert compared == {name: value.flatten().tolist() for name, value in values.items()}


def layout_with(masters: list[torch.Tensor]) -> MasterLayout:
    """Of whole masters and their AdamW, in two groups, as before the first update."""
    layout = object.__new__(MasterLayout)
    one, two = masters
    layout.optimizer = torch.optim.AdamW(
        [{"params": [one], "lr": 0.5}, {"params": [two], "lr": 0.25}], weight_decay=0.1
    )
    layout.groups = [
        Group(master, torch.float32, (Slot(name, master.shape, 0, 0),), shards=1, index=0)
        for name, master in zip("ab", masters, strict=True)
    ]
    return layout


def test_a_state_before_the_first_update_changes_nothing() -> None:
    masters = [torch.linspace(-1, 1, n).requires_grad_() for n in (5, 3)]
    before = [master.detach().clone() for master in masters]
    layout = layout_with(masters)
    layout.create_optimizer_state()
    for master, old in zip(masters, before, strict=True):
        state = layout.optimizer.state[master]
        assert torch.equal(master, old)
        assert master.grad is None
        assert int(state["step"]) == 0
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
    assert [(group["lr"], group["params"]) for group in layout.optimizer.param_groups] == [
        (0.5, [masters[0]]),
        (0.25, [masters[1]]),
    ]


def test_a_gathered_state_is_apart_from_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    masters = [torch.linspace(-1, 1, n) for n in (5, 3)]
    before = [master.clone() for master in masters]
    monkeypatch.setattr(zero.dist, "get_rank", lambda: 0)
    found = zero.full_state(layout_with(masters), "master")
    for master in masters:
        master.add_(1)
    assert found is not None
    assert torch.equal(found["a"], before[0])
    assert torch.equal(found["b"], before[1])


# ------------------------------------------------------------------------------------------------------ the update
class Step(nn.Module):
    """A student whose gradient is `scale` times something."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))

    def forward(self, scale: float) -> Tensor:
        x = torch.linspace(-1, 1, 20).view(4, 5).to(self.student[0].weight.dtype)
        return (self.student(x).float() ** 2).mean() * scale


def learnt(
    scales: list[float], limit: float, launch: ranks_launch.Launch, waits: bool, preset: str
) -> tuple[States, Any]:
    """Every state after an update with each scale, of two micro-steps, and the engine."""
    recipe = Recipe(batch_size=4, accum_iter=2, lr=1e-2, clip_grad=limit, deepspeed_config=preset).resolve(8, 1)
    module = Step()
    built = engine.build_engine(module, recipe, deepspeed_json.merge_config(recipe.deepspeed_config, recipe, 1), launch)
    assert waits or update_without_waits(built)
    teacher = EMATeacher(built, module.student, "student.", Step().student, 0.9)
    for scale in scales:
        for part in (0.25, 0.75):
            built.backward(built(scale * part))
            built.step()
    return {which: full_state(teacher.layout, which) or {} for which in STATES}, built  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("limit", "bits"), [(0.0, True), (1e6, True), (0.01, False)])
def test_the_update_is_deepspeeds(limit: float, bits: bool, preset: str) -> None:
    """Bit for bit where nothing is clipped; else up to the order of the sums in the norm."""
    with ranks_launch.session() as launch:
        ours, own = learnt([1.0, 3.0, 0.5], limit, launch, False, preset)
        theirs, deepspeeds = learnt([1.0, 3.0, 0.5], limit, launch, True, preset)
        torch.testing.assert_close(float(engine.grad_norm(own)), float(engine.grad_norm(deepspeeds)), rtol=1e-5, atol=0)
    for which, wanted in theirs.items():
        for name, values in wanted.items():
            if bits and which != "ema":  # whose weight is a tensor here
                assert torch.equal(ours[which][name], values), (which, name)
            torch.testing.assert_close(ours[which][name], values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_update_that_is_not_finite_is_left_out(bad: float, preset: str) -> None:
    with ranks_launch.session() as launch:
        wanted, _ = learnt([1.0, 2.0], 0.01, launch, False, preset)
        found, built = learnt([1.0, bad, 2.0], 0.01, launch, False, preset)
        assert {float(built.basic_optimizer.state[m]["step"]) for m in MasterLayout(built).masters} == {2.0}
        stopped, built = learnt([1.0, bad], 0.01, launch, False, preset)
        assert float(engine.grad_norm(built)) == float("inf")
    for which, values in wanted.items():
        for name in values:
            assert torch.equal(found[which][name], values[name]), (which, name)
            assert stopped[which][name].isfinite().all()


def test_other_engines_keep_deepspeeds_update() -> None:
    with ranks_launch.session() as launch:
        recipe = Recipe(batch_size=4, deepspeed_config="zero1_fp32").resolve(4, world_size=1)
        config = deepspeed_json.merge_config(recipe.deepspeed_config, recipe, 1)
        built = engine.build_engine(Step(), recipe, config, launch)
        step = built.optimizer.step
        assert not update_without_waits(built)
        assert built.optimizer.step == step


class StaysHere(Step):
    """For a launch that says "cuda" where there is none."""

    def to(self, *_: Any, **__: Any) -> "StaysHere":
        return self


@pytest.mark.parametrize(("device", "policy", "taken"), [("cuda", "halt", 1), ("cuda", "skip", 0), ("cpu", "halt", 0)])
def test_gpus_take_it_unless_every_update_must_be_known(
    device: str, policy: str, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(engine, "update_without_waits", given.append)
    recipe = Recipe(batch_size=4, deepspeed_config="zero1_bf16", on_nonfinite=policy).resolve(4, world_size=1)
    config = deepspeed_json.merge_config(recipe.deepspeed_config, recipe, 1)
    with ranks_launch.session() as launch:
        seen: Any = SimpleNamespace(device=SimpleNamespace(type=device), world_size=1)
        module = StaysHere()
        built = engine.build_engine(module, recipe, config, seen if device == "cuda" else launch)
    assert given == [built] * taken


# ------------------------------------------------------------------------------------------------------ the gradients
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_gradients_added_at_once_are_deepspeeds(micro_steps: int) -> None:
    """Bit for bit, and none is left in bfloat16."""
    recipe = Recipe(batch_size=4, accum_iter=micro_steps, lr=1e-2, clip_grad=0.01).resolve(12, world_size=1)
    states = []
    with ranks_launch.session() as launch:
        for at_once in (True, False):
            module = Step()
            config = deepspeed_json.merge_config("zero1_bf16", recipe, 1)
            built = engine.build_engine(module, recipe, config, launch)
            assert update_without_waits(built)
            if at_once:
                add_gradients_at_once(built)
            for scale in (1.0, 3.0, 0.5, 2.0, 7.0, 0.1):
                built.backward(built(scale))
                assert all(weight.grad is None for weight in module.parameters())
                built.step()
            layout = MasterLayout(built)
            states.append([full_state(layout, which) for which in ("master", "exp_avg", "exp_avg_sq")])
            assert built.global_steps == 6 // micro_steps
    for ours, theirs in zip(*states, strict=True):
        assert ours is not None
        assert theirs is not None
        assert all(torch.equal(ours[name], values) for name, values in theirs.items())
