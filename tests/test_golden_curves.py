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
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import pretrain, recipes, schedule
from fasthpm.data import build_loader
from fasthpm.model import Output
from fasthpm.patches import model_of
from fasthpm.ranks.engine import parameter_groups
from fasthpm.step import Step
from tests.helpers.gpu_branches import gpu_branches

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


def curve(case: str) -> tuple[list[list[float]], list[list[float]]]:
    """[reconstruction loss, difficulty loss] of every update; the norms of their gradients at `GRADIENTS_AT`."""
    recipe = dataclasses.replace(recipes.debug(), batch_size=BATCH, warmup_epochs=0.0, **CASES[case]).resolve(400, 1)
    loader = build_loader("synthetic:400", batch_size=BATCH, image_size=(28, 28), channels=1, num_workers=1)
    loader = pretrain.on_device(loader, torch.device("cpu"))
    step, teacher = Step(model_of(recipe), recipe, loader.info), model_of(recipe).eval().requires_grad_(False)
    step.attach_teacher(teacher)
    optimizer = torch.optim.AdamW(parameter_groups(step, recipe.weight_decay), recipe.lr, betas=(0.9, 0.95))
    outputs: list[Output] = []
    step.student.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    losses, norms = [], []
    for number, batch in zip(range(UPDATES), loader, strict=False):
        alpha = torch.tensor(schedule.alpha_at(recipe, number), dtype=torch.float64)
        output = step(batch.images, batch.ids, torch.tensor(number), alpha)
        optimizer.zero_grad()
        if number in GRADIENTS_AT:
            norms.append([gradient_norm(part, step) for part in outputs[-1][1:3]])
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), recipe.clip_grad)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(step.student.parameters()), 0.01)
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


def test_the_branches_of_gpus_give_the_golden_losses_too() -> None:
    """Maps, masks by torch, large blocks of pairs, batches one ahead."""
    with gpu_branches():
        test_the_losses_are_the_golden_ones("hpm")


if __name__ == "__main__":
    found = {case: curve(case) for case in CASES}
    for file, place in ((FILE, 0), (GRADIENTS, 1)):
        file.write_text(json.dumps({case: both[place] for case, both in found.items()}, indent=1) + "\n")
    sys.exit(0)
