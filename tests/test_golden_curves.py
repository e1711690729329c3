"""Golden loss curves: 50 updates on the CPU in float32, from fixed seeds, against curves that are kept.

A speed-up must not change them. On the machine that wrote them they repeat to a few units in the last place; another
CPU rounds otherwise, masks may then flip between patches of almost equal difficulty, and the curves part slowly:
TOLERANCE is for that. The curves alone are blind to a loss whose gradient is a little too long: clipping and AdamW take
a common factor out again. So the norms of both losses' own gradients are kept too, at a few updates.
`python tests/test_golden_curves.py` writes them anew, which a change of method alone justifies.
"""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import pretrain, recipes, schedule
from fasthpm.data import build_loader
from fasthpm.model import Output
from fasthpm.patches import model_of
from fasthpm.ranks.engine import parameter_groups
from fasthpm.speed.graph import WARM_UP, Eager, Graphs
from fasthpm.step import Step
from tests.helpers.gpu_branches import gpu_branches
from tests.helpers.recorder import FakeRecorder, without_numpy

FILE = Path(__file__).parent / "golden" / "curves.json"
GRADIENTS = FILE.with_name("gradients.json")
UPDATES, BATCH = 50, 8
TOLERANCE = 5e-3  # relative, of every loss
GRADIENTS_AT = (0, 2, 10)  # updates, before curves of two machines have parted
GRADIENT_TOLERANCE = 2e-3  # relative, of every norm
CASES: dict[str, dict[str, Any]] = {
    "hpm": {},
    "mae": {"mask_policy": "random", "predict_loss": "none"},
    "absolute": {"predict_loss": "absolute"},
    "hpm_fast": {"predictor": "shared", "decoder_attention": "cross"},
}


class Loop(SimpleNamespace):
    """The updates of a curve, as much like a DeepSpeed engine as `fasthpm.speed.graph` needs."""

    micro_steps = global_steps = global_samples = 0
    _step_applied = _running_engine_step = enable_backward_allreduce = False
    _global_grad_norm: Any = torch.zeros(())
    optimizer = SimpleNamespace(exit_backward=lambda: None)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.basic_optimizer.zero_grad()
        loss.backward()

    def step(self) -> None:
        self._global_grad_norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad)
        self.basic_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.module.student.parameters()), 0.01)

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def get_global_grad_norm(self) -> Any:
        return self._global_grad_norm

    def train_batch_size(self) -> int:
        return BATCH


def curve(case: str, record: Any = None) -> tuple[list[list[float]], list[list[float]]]:
    """[reconstruction loss, difficulty loss] of every update; the norms of their gradients at `GRADIENTS_AT`.

    - `record`: makes graphs, which know no such norms, of the updates; None: they run as they are written
    """
    recipe = dataclasses.replace(recipes.debug(), batch_size=BATCH, warmup_epochs=0.0, **CASES[case]).resolve(400, 1)
    loader = build_loader("synthetic:400", batch_size=BATCH, image_size=(28, 28), channels=1, num_workers=1)
    loader = pretrain.on_device(loader, torch.device("cpu"))
    step, teacher = Step(model_of(recipe), recipe, loader.info), model_of(recipe).eval().requires_grad_(False)
    step.attach_teacher(teacher)
    groups = parameter_groups(step, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.95), fused=record is not None)
    loop = Loop(module=step, teacher=teacher, basic_optimizer=optimizer, clip_grad=recipe.clip_grad)
    micro_step = Graphs(Eager(loop), step.stopwatch, record) if record else None
    outputs: list[Output] = []
    step.student.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    losses, norms = [], []
    for number, batch in zip(range(UPDATES), loader, strict=False):
        alpha = torch.tensor(schedule.alpha_at(recipe, number), dtype=torch.float64)
        inputs = batch.images, batch.ids, torch.tensor(number), alpha
        output = micro_step(*inputs) if micro_step else loop(*inputs)
        if not micro_step:
            if number in GRADIENTS_AT:
                norms.append([gradient_norm(part, step) for part in outputs[-1][1:3]])
            loop.backward(output.loss)
            loop.step()
        losses.append(output.metrics[1:3].tolist())
    loader.close()
    return losses, norms


def gradient_norm(loss: Tensor, step: Step) -> float:
    """Of one loss alone, over all weights; its graph stays."""
    if not loss.requires_grad:
        return 0.0
    found = torch.autograd.grad(loss, list(step.student.parameters()), retain_graph=True, allow_unused=True)
    return float(torch.nn.utils.get_total_norm([gradient for gradient in found if gradient is not None]))


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_the_golden_ones(case: str) -> None:
    golden, gradients = (json.loads(file.read_text())[case] for file in (FILE, GRADIENTS))
    assert len(golden) == UPDATES
    assert len(gradients) == len(GRADIENTS_AT)
    losses, norms = curve(case)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(gradients), rtol=GRADIENT_TOLERANCE, atol=1e-6)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(golden), rtol=TOLERANCE, atol=1e-5)
    assert golden[-1][0] < golden[0][0]


def test_graphs_give_the_golden_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fake recorder, which says that it is one."""
    without_numpy(monkeypatch)
    recorder = FakeRecorder()
    losses, _ = curve("hpm", recorder)
    golden = json.loads(FILE.read_text())["hpm"]
    assert (recorder.made, recorder.runs) == (1, UPDATES - WARM_UP)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(golden), rtol=TOLERANCE, atol=1e-5)


def test_the_branches_of_gpus_give_the_golden_losses_too() -> None:
    """Maps, masks by torch, large blocks of pairs, batches one ahead."""
    with gpu_branches():
        test_the_losses_are_the_golden_ones("hpm")


if __name__ == "__main__":
    found = {case: curve(case) for case in CASES}
    for file, place in ((FILE, 0), (GRADIENTS, 1)):
        file.write_text(json.dumps({case: both[place] for case, both in found.items()}, indent=1) + "\n")
    sys.exit(0)
