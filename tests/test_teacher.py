"""The EMA teacher on real ranks: every ZeRO preset on one and two ranks, against a closed form in float64.

pytest starts this very file as the ranks' program (`main`): one launch per number of ranks runs every preset and
writes what it measured as JSON, and the tests below judge it.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasthpm import teacher as teacher_module
from fasthpm.checkpoint import shards
from fasthpm.cli import run_rank
from fasthpm.ranks import deepspeed_json, engine
from fasthpm.ranks import launch as ranks_launch
from fasthpm.ranks.zero import MasterLayout, full_state, update_without_waits
from fasthpm.recipe import Recipe
from fasthpm.teacher import EMATeacher
from tests.helpers import reference
from tests.helpers.launch import check_ranks
from tests.helpers.layouts import KINDS, group_of

ROOT = Path(__file__).resolve().parents[1]
STEPS, CHECKPOINT_STEP = 20, 10
STATES = ("master", "ema", "exp_avg", "exp_avg_sq")
PAIRED = [f"{name}-{ranks}" for name in ("zero0_fp32", "zero1_fp32", "zero1_bf16", "zero2_bf16") for ranks in (1, 2)]
BF16 = {"bf16": {"enabled": True}}
WITHOUT_WAITS = ("zero1_bf16", "zero2_bf16")  # how GPUs update these
AUTO = dict.fromkeys(("train_batch_size", "gradient_clipping"), "auto")
# The shipped presets, and two further layouts and options that users may choose.
CONFIGS: dict[str, dict[str, Any]] = {
    "zero1_bf16_accumulation": {**AUTO, **BF16, "zero_optimization": {"stage": 1}},
    **{
        f"{name}_without_waits": json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        for name in WITHOUT_WAITS
    },
    # ZeRO 3 comes last: it replaces torch.nn.functional.linear in the whole process.
    **{path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))},
    "zero3_small_groups": {
        **AUTO,
        **BF16,
        "zero_optimization": {"stage": 3, "sub_group_size": 40, "overlap_comm": True},
    },
}


class Toy(nn.Module):
    """Odd sizes, a parameter of the root itself, a norm, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 7))
        self.register_buffer("scale", torch.linspace(0.3, 1.7, 5))
        self.proj = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x.to(self.cls_token.dtype) * self.scale)
        return self.head(self.norm(torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)))


class Output(NamedTuple):
    loss: Tensor
    other: Tensor


class ToyStep(nn.Module):
    """Like `fasthpm.step.Step`: the student inside, integer and float64 inputs that must arrive as they are."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.student = Toy()

    def forward(self, images: Tensor, ids: Tensor, step: int, alpha: Tensor) -> Output:
        assert (images.dtype, ids.dtype, alpha.dtype, type(step)) == (torch.uint8, torch.int64, torch.float64, int)
        x = images.float() / 255
        out = self.student(x).float()
        per_sample = ((out.mean(1) - x.mean(1)[:, :3]) ** 2).mean(1) * (1 + ids % 3)
        return Output(per_sample.mean() * (1 + alpha), out.detach())


class Run:
    """An engine with its teacher, trained on batches that are a function of the step and split over the ranks."""

    def __init__(
        self, config: dict[str, Any], recipe: Recipe, launch: ranks_launch.Launch, seed: int = 0, waits: bool = True
    ) -> None:
        self.launch, self.recipe = launch, recipe
        self.step_module = ToyStep(seed)
        self.engine = engine.build_engine(self.step_module, recipe, config, launch)
        assert waits or update_without_waits(self.engine)
        torch.manual_seed(99)
        self.teacher = EMATeacher(self.engine, self.step_module.student, "student.", Toy(), 0.0)
        self.layout = MasterLayout(self.engine)

    def train(self, steps: range) -> Iterator[int]:
        for step in steps:
            engine.set_lr(self.engine, 1e-2 * (1 + step % 3))
            self.teacher.momentum = momentum_at(step)
            for micro in range(self.recipe.accum_iter):
                output = self.engine(*self.batch(step, micro), step, torch.tensor(0.25, dtype=torch.float64))
                self.engine.backward(output.loss)
                self.engine.step()
            yield step

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        size, generator = self.recipe.batch_size, torch.Generator().manual_seed(7 * step)
        images = torch.randint(256, (self.recipe.global_batch_size, 4, 5), dtype=torch.uint8, generator=generator)
        start = (micro * self.launch.world_size + self.launch.rank) * size
        rows = torch.arange(start, start + size)
        return images[rows].to(self.launch.device), rows.to(self.launch.device)

    def states(self) -> dict[str, dict[str, Tensor] | None]:
        return {which: full_state(self.layout, which) for which in STATES}

    def copy_is_rounded_ema(self) -> bool:
        """Whether this rank's teacher equals the gathered float32 average in the forward dtype, bit for bit."""
        weights = dict(self.teacher.module.named_parameters())
        dtype = self.engine.get_data_types()[0]
        equal = {
            name: torch.equal(weights[name.removeprefix("student.")], ema.to(dtype))
            for name, ema in self.layout.gather(self.layout.shards("ema"))
        }
        buffers = self.teacher.module.scale.dtype == dtype and torch.equal(
            self.teacher.module.scale, self.step_module.student.scale
        )
        return len(equal) == len(weights) and all(equal.values()) and buffers


def momentum_at(step: int) -> float:
    return 0.9 + 0.005 * step - 0.03 * (step % 3)


def measure(config: dict[str, Any], recipe: Recipe, launch: ranks_launch.Launch, folder: Path) -> dict[str, Any]:
    """Train, save on the way, load what was saved into a new engine, and train on."""
    waits = "without_waits" not in folder.name
    run, found = Run(config, recipe, launch, waits=waits), {}
    start = run.states()
    write_state(run, folder / "start")
    found["starts_as_student"] = same(start["ema"], start["master"]) and not any_nonzero(start["exp_avg"])
    found["copy_equal"] = run.copy_is_rounded_ema()
    found["notices_a_shift"] = notices_a_shift(MasterLayout(run.engine))
    exact = bf16 = to_double(start["master"])
    for step in run.train(range(STEPS)):
        found["copy_equal"] &= run.copy_is_rounded_ema()
        master, m = to_double(full_state(run.layout, "master")), momentum_at(step)
        exact = {name: reference.ema(exact[name], master[name], m) for name in master}
        bf16 = {name: (m * bf16[name] + (1 - m) * master[name]).bfloat16().double() for name in master}
        if step == CHECKPOINT_STEP - 1:
            middle = run.states()
            write_state(run, folder / "middle")
    end = run.states()
    found["deepspeed_agrees"] = masters_are_deepspeeds(run)
    found["error"], found["error_of_bf16_ema"] = distance(end["ema"], exact), distance(bf16, exact)
    found["moved"] = distance(start["master"], to_double(end["master"]))
    found["skipped"] = run.engine.skipped_steps
    found["grad_norm"] = float(engine.grad_norm(run.engine))
    found["adam_steps"] = [float(run.layout.optimizer.state[m]["step"]) for m in run.layout.masters]
    if launch.rank == 0:
        torch.save(end["master"], folder / "masters.pt")

    again = Run(config, recipe, launch, seed=1, waits=waits)
    for tag, wanted in (("start", start), ("middle", middle)):
        shards.restore(again.layout, shards.SavedState(folder / tag))
        again.teacher.refresh()
        found[f"loads_{tag}"] = same_states(again.states(), wanted) and again.copy_is_rounded_ema()
    for _ in again.train(range(CHECKPOINT_STEP, STEPS)):
        pass
    found["continues"] = same_states(again.states(), end)
    found["takes_over"] = {
        other.parent.name: takes_over(again, other) for other in sorted(folder.parent.glob("*/middle"))
    }
    return found


def write_state(run: Run, folder: Path) -> None:
    """As a checkpoint does it: every rank its own part."""
    folder.mkdir(exist_ok=True)
    taken = shards.snapshot(run.layout, run.launch.rank, shards.Staging())
    shards.write(taken, shards.rank_file(folder, run.launch.rank))
    dist.barrier()


def takes_over(run: Run, folder: Path) -> bool:
    """Whether a state that another preset, or another number of ranks, has written is restored bit for bit."""
    saved = shards.SavedState(folder)
    shards.restore(run.layout, saved)
    run.teacher.refresh()
    states = run.states()
    wanted = {which: {name: saved.whole(which, name) for name in saved.names} for which in STATES}
    steps = {int(run.layout.optimizer.state[m]["step"]) for m in run.layout.masters}
    equal = run.launch.rank > 0 or same_states(states, wanted)
    return equal and steps == {CHECKPOINT_STEP} and run.copy_is_rounded_ema() and masters_are_deepspeeds(run)


def masters_are_deepspeeds(run: Run) -> bool:
    """Whether the masters equal what DeepSpeed's own (slow) call gives, and round to the weights in use."""
    from deepspeed.utils import safe_get_full_fp32_param

    partitioned = run.engine.zero_optimization_stage() == 3
    parameters, equal = dict(run.engine.module.named_parameters()), []
    for name, master in run.layout.gather(run.layout.masters):
        if run.engine.zero_optimization_stage():
            equal.append(torch.equal(master, safe_get_full_fp32_param(parameters[name]).view(master.shape)))
        if not partitioned:
            equal.append(torch.equal(master.to(parameters[name].dtype), parameters[name]))
    return len(equal) >= len(parameters) and all(equal)


def notices_a_shift(layout: MasterLayout) -> bool:
    """Whether the layout's own check fails on this rank for a weight that lies one element further on than claimed."""
    for number, group in enumerate(layout.groups):
        slots = [
            dataclasses.replace(slot, offset=slot.offset + slot.name.endswith("head.weight")) for slot in group.slots
        ]
        layout.groups[number] = dataclasses.replace(group, slots=tuple(slots))
    try:
        layout._check()
    except ValueError as error:
        return "head.weight" in str(error)
    return False


def same(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> bool:
    """Whether both hold the same bits; ranks that hold nothing agree."""
    return (a or {}).keys() == (b or {}).keys() and all(torch.equal(a[name], b[name]) for name in a or {})


def same_states(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(same(a[which], b[which]) for which in STATES)


def any_nonzero(tensors: dict[str, Tensor] | None) -> bool:
    return any(bool(tensor.any()) for tensor in (tensors or {}).values())


def to_double(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in (tensors or {}).items()}


def distance(a: dict[str, Tensor] | None, b: dict[str, Tensor]) -> float:
    """Largest difference in any parameter, relative to that parameter's largest value."""
    return max((float((a[n].double() - b[n]).abs().max() / b[n].abs().max()) for n in b), default=0.0)


def main(out: Path) -> None:
    with ranks_launch.session() as launch:
        recipe = Recipe(batch_size=8 // launch.world_size, global_batch_size=16, lr=1e-2, clip_grad=0.5)
        recipe = recipe.resolve(num_samples=16, world_size=launch.world_size)
        for name, config in CONFIGS.items():
            folder = out / f"{name}-{launch.world_size}"
            folder.mkdir(parents=True, exist_ok=True)
            (out / f"{name}-{launch.rank}.json").write_text(json.dumps(config))
            merged = deepspeed_json.merge_config(out / f"{name}-{launch.rank}.json", recipe, launch.world_size)
            found = measure(merged, recipe, launch, folder)
            (folder / f"rank{launch.rank}.json").write_text(json.dumps(found))


# -------------------------------------------------------------------------------------------------- without ranks
class Engine:
    """As much of DeepSpeed's engine as a teacher of one rank needs: masters in float32, weights in bfloat16."""

    device = torch.device("cpu")

    def __init__(self, student: nn.Module) -> None:
        values = {f"student.{name}": weight.detach() for name, weight in student.named_parameters()}
        group = group_of(values, "flat", 1, 0, torch.bfloat16)
        self.optimizer = torch.optim.AdamW([group.master], lr=0.1)
        self.groups, self.masters = [group], [group.master]
        shape = torch.zeros_like(group.master)
        self.optimizer.state[group.master] = {"step": torch.zeros(()), "exp_avg": shape, "exp_avg_sq": shape.clone()}


def test_the_copy_is_the_average_and_follows_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every step: the masters' average, rounded, but for what the teacher has as the student has it."""
    monkeypatch.setattr(teacher_module, "MasterLayout", lambda engine: engine)
    student, copy = Toy(), Toy()
    engine = Engine(student)
    (group,), (master,) = engine.groups, engine.masters
    student.scale *= 2
    teacher = EMATeacher(engine, student, "student.", copy, 0.75, followed="head.")
    assert torch.equal(copy.scale, student.scale)
    average, weights = master.double(), dict(copy.named_parameters())
    for step in range(4):
        teacher.momentum = 0.75 + 0.05 * step
        master.grad = torch.sin(master * 9 + step)
        engine.optimizer.step()
        average = reference.ema(average, master.double(), teacher.momentum)
        for slot in group.slots:
            source = master.double() if slot.name.startswith("student.head.") else average
            want = group.part(source, slot).view(slot.shape)
            got = weights[slot.name.removeprefix("student.")]
            torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-6)
    assert (average - master.double()).abs().max() > 0.05
    places = {name: tensor.data_ptr() for name, tensor in copy.state_dict().items()}
    teacher.refresh()  # as after loading a checkpoint, while a recorded step reads them
    assert {name: tensor.data_ptr() for name, tensor in copy.state_dict().items()} == places


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_followed_parameters_are_found_in_every_shard(kind: str, world: int) -> None:
    """All of their elements, and none of another parameter's."""
    shapes = {"student.a": (3, 5), "student.head.a": (7,), "student.head.b": (2, 3), "student.b": (4,)}
    values = {name: torch.full(shape, 1.0 + ("head." in name)) for name, shape in shapes.items()}
    found = 0
    for rank in range(world):
        group = group_of(values, kind, world, rank)
        marked = torch.zeros_like(group.master)
        for slot in group.slots:
            if (span := teacher_module._span(group, slot, "student.head.")) is not None:
                marked[span] = 1
        found += int((group.master == 2).sum())
        assert not marked[group.master == 1].any()
        assert marked[group.master == 2].all()
    assert found == 13


@pytest.fixture(scope="module", params=[1, 2], ids=["1_rank", "2_ranks"])
def found(request: pytest.FixtureRequest, measured: dict[int, Path]) -> tuple[int, Path]:
    return request.param, measured[request.param]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folder of the measurements by number of ranks."""
    folder = tmp_path_factory.mktemp("teacher")
    shared_memory = set(Path("/dev/shm").iterdir())
    for ranks in (1, 2):
        check_ranks(Path(__file__), folder, ranks=ranks, launcher="forked", timeout=300)
    left = {path.name for path in set(Path("/dev/shm").iterdir()) - shared_memory}
    assert not any("deepspeed" in name for name in left)
    return {1: folder, 2: folder}


def of_ranks(found: tuple[int, Path], config: str) -> list[dict[str, Any]]:
    ranks, folder = found
    return [json.loads((folder / f"{config}-{ranks}" / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("config", CONFIGS)
class TestEveryPreset:
    def test_average_has_the_closed_form(self, found: tuple[int, Path], config: str) -> None:
        first = of_ranks(found, config)[0]
        assert first["error"] <= 1e-6
        # The trajectory can tell: an average kept in bfloat16 would miss it by far, and the weights do move.
        assert first["error_of_bf16_ema"] > 1e-3
        assert first["moved"] > 0.05

    def test_copy_is_the_rounded_average_on_every_rank_after_every_step(
        self, found: tuple[int, Path], config: str
    ) -> None:
        assert all(rank["starts_as_student"] and rank["copy_equal"] for rank in of_ranks(found, config))

    def test_checkpoints_restore_every_bit_and_training_continues_alike(
        self, found: tuple[int, Path], config: str
    ) -> None:
        for rank in of_ranks(found, config):
            assert rank["loads_start"]
            assert rank["loads_middle"]
            assert rank["continues"]

    def test_any_preset_continues_what_any_other_has_saved(self, found: tuple[int, Path], config: str) -> None:
        for rank in of_ranks(found, config):
            assert rank["takes_over"][f"{config}-{found[0]}"]
            assert all(rank["takes_over"].values()), rank["takes_over"]

    def test_masters_are_the_ones_deepspeed_reports(self, found: tuple[int, Path], config: str) -> None:
        assert all(rank["deepspeed_agrees"] for rank in of_ranks(found, config))

    def test_a_layout_that_is_not_the_claimed_one_is_noticed(self, found: tuple[int, Path], config: str) -> None:
        assert any(rank["notices_a_shift"] for rank in of_ranks(found, config))

    def test_optimizer_counts_its_own_steps_only(self, found: tuple[int, Path], config: str) -> None:
        for rank in of_ranks(found, config):
            assert set(rank["adam_steps"]) == {STEPS}
            assert rank["skipped"] == 0
            assert 0.1 < rank["grad_norm"] < 10


def test_two_ranks_took_over_what_one_has_saved(measured: dict[int, Path]) -> None:
    last = of_ranks((2, measured[2]), list(CONFIGS)[-1])[0]["takes_over"]
    assert set(last) == {f"{config}-{ranks}" for config in CONFIGS for ranks in (1, 2)}


def test_one_and_two_ranks_learn_the_same(measured: dict[int, Path]) -> None:
    """One rank reduces no gradients (ZeRO 0, and 1 in bf16); two do."""
    learnt = {name: torch.load(measured[int(name[-1])] / name / "masters.pt") for name in PAIRED}
    for ranks, name in itertools.product((1, 2), WITHOUT_WAITS):
        # Clipped in both: the order of the sums in the norm is all that differs.
        fast = torch.load(measured[ranks] / f"{name}_without_waits-{ranks}" / "masters.pt")
        assert distance(fast, to_double(learnt[f"{name}-{ranks}"])) < 1e-2
        for config in (f"{name}_without_waits", name):
            norms = [rank["grad_norm"] for rank in of_ranks((ranks, measured[ranks]), config)]
            assert norms == [pytest.approx(of_ranks((1, measured[1]), name)[0]["grad_norm"], rel=1e-2)] * ranks
    for config, tolerance in (("zero0_fp32", 1e-4), ("zero1_fp32", 1e-4), ("zero1_bf16", 1e-2), ("zero2_bf16", 1e-2)):
        one, two = (learnt[f"{config}-{ranks}"] for ranks in (1, 2))
        assert distance(one, to_double(two)) < tolerance
    assert distance(learnt["zero0_fp32-1"], to_double(learnt["zero1_fp32-1"])) < 1e-5


def test_float32_without_zero_clips_as_zero_does(measured: dict[int, Path]) -> None:
    """The norm is above the limit of 0.5, and both have learnt the same (above)."""
    norms = [of_ranks((1, measured[1]), config)[0]["grad_norm"] for config in ("zero0_fp32", "zero1_fp32")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


if __name__ == "__main__":
    run_rank(lambda _: main(Path(sys.argv[1])))
