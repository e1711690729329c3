"""Whole updates of iBOT, of HPM on it, and of iBOT as published code is built, interleaved; the memory of its heads.

    python -m bench.views [--size small] [--batch_size 4] [--local_crops 10] [--rounds 3] [-o views.json]

Ours go through the DeepSpeed engine in float32 (ZeRO 0). `eager` is structured as iBOT's code is: attention as
matrices, a teacher and a student whose heads run on *all* patches, 8,192 logits of each and their softmax in memory,
loops over pairs of views, gradients clipped parameter by parameter with a look from the host at each, an average of the
weights tensor by tensor. The variants take turns within a round; a ratio is the median of the rounds' ratios, of
processor seconds, which a busy machine disturbs least.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines import EPS, EagerBlock
from bench.common import machine, ratios, say, show, table, write_json
from bench.eager import average
from bench.step import INFO, measure
from fasthpm import ranks, recipes, schedule
from fasthpm.cli import Parser, run_command
from fasthpm.difficulty import HEAD
from fasthpm.patches import model_of
from fasthpm.projection import BOTTLENECK
from fasthpm.recipe import Recipe
from fasthpm.speed import graph
from fasthpm.speed.flops import step_flops
from fasthpm.teacher import EMATeacher
from fasthpm.views import inputs_of, step_of

VARIANTS = ("ibot", "hpm_ibot", "eager")
RATIOS = (("HPM-iBOT / iBOT", "hpm_ibot", "ibot"), ("eager iBOT / iBOT", "eager", "ibot"))
ALPHA = 0.25


class EagerIBOT(nn.Module):
    """A ViT with mask tokens and a head on all of its tokens, sizes as those of `student`, an `HPMViT`."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        own: Any = student
        dim, side = own.embed_dim, own.patch_size
        self.patch_embed = nn.Conv2d(own.in_chans, dim, side, side)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 1 + own.num_patches, dim) * 0.02)
        self.blocks = nn.Sequential(*(EagerBlock(dim, own.num_heads) for _ in own.blocks))
        self.norm, self.grid = nn.LayerNorm(dim, EPS), own.grid_size
        self.head = nn.Sequential(*copy.deepcopy(own.decoder_pred).mlp)
        self.last = nn.Linear(BOTTLENECK, own.objective.width, bias=False)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> logits of all tokens, [B, 1 + L, K]."""
        tokens = self.patch_embed(images)
        rows, columns = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask[:, :, None], self.mask_token, tokens)
        table = self.positions[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        places = nn.functional.interpolate(table, (rows, columns), mode="bicubic").flatten(2).transpose(1, 2)
        cls = (self.cls_token + self.positions[:, :1]).expand(len(tokens), -1, -1)
        hidden = self.norm(self.blocks(torch.cat([cls, tokens + places], dim=1)))
        return self.last(nn.functional.normalize(self.head(hidden), dim=-1))


def eager_update(recipe: Recipe, images: Tensor, local: Tensor) -> Callable[[int], None]:
    """One update on normalised crops [S V, C, H, W] and [S n, C, h, w], V at first."""
    student = EagerIBOT(model_of(recipe))
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    views, small = recipe.global_crops, recipe.local_crops
    centre = torch.zeros(2, recipe.prototypes)

    def losses(mask: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = teacher(images)
            means = torch.stack([theirs[:, 0].mean(0), theirs[:, 1:].mean((0, 1))])
            wanted = ((theirs[:, 0] - centre[0]) / 0.07).softmax(-1).chunk(views)
            wanted_patches = ((theirs[:, 1:] - centre[1]) / 0.07).softmax(-1).chunk(views)
            centre.lerp_(means, 0.1)
        ours, crops = student(images, mask), student(local)
        seen = [*(ours[:, 0] / 0.1).chunk(views), *(crops[:, 0] / 0.1).chunk(small)]
        patches, masks = (ours[:, 1:] / 0.1).chunk(views), mask.float().chunk(views)
        cls, patch = [], []
        for q in range(views):
            for v in range(len(seen)):
                if v == q:
                    each = -(wanted_patches[q] * patches[v].log_softmax(-1)).sum(-1)
                    patch.append(((each * masks[v]).sum(-1) / masks[v].sum(-1).clamp(min=1)).mean())
                else:
                    cls.append(-(wanted[q] * seen[v].log_softmax(-1)).sum(-1).mean())
        return torch.stack(cls).mean() + torch.stack(patch).mean()

    def update(number: int) -> None:
        shares = torch.where(torch.rand(len(images)) < 0.5, 0.0, 0.1 + 0.4 * torch.rand(len(images)))
        mask = torch.rand(len(images), recipe.num_patches) < shares[:, None]
        loss = losses(mask)
        optimizer.zero_grad()
        loss.backward()
        for weight in student.parameters():
            norm = float(weight.grad.norm()) if weight.grad is not None else 0.0
            if weight.grad is not None and norm > recipe.clip_grad:
                weight.grad.mul_(recipe.clip_grad / (norm + 1e-6))
        optimizer.step()
        average(teacher, student, 0.996)
        loss.item()

    return update


def our_update(recipe: Recipe, launch: ranks.Launch) -> Callable[[int], None]:
    """One update of a resolved recipe through the engine."""
    step = step_of(model_of(recipe), recipe, INFO)
    built = ranks.build_engine(step, recipe, ranks.merge_config(recipe.deepspeed_config, recipe, 1), launch)
    teacher = EMATeacher(built, step.student, "student.", model_of(recipe), 0.996, HEAD)
    step.attach_teacher(teacher.module)
    micro_step = graph.micro_step("off", built, step.stopwatch)
    images, ids, local = inputs_of(recipe, lambda shape: torch.randint(0, 256, shape, dtype=torch.uint8))

    def update(number: int) -> None:
        ranks.set_lr(built, schedule.lr_at(recipe, number))
        alpha = torch.full((), ALPHA, dtype=torch.float64)
        micro_step(images, ids, torch.full((), number), alpha, None, *local)
        step.end_update(True)

    return update


def recipe_of(variant: str, size: str, batch_size: int, local_crops: int) -> Recipe:
    """The 50-epoch recipe of a variant at the bench's size, without drop path and colours, which eager lacks."""
    base = recipes.from_name("hpm_ibot_vit_base_in1k_50e" if variant == "hpm_ibot" else "ibot_vit_base_in1k_50e")
    shape = {"input_size": "28", "patch_size": 4, "local_size": 12} if size == "nano" else {}
    return replace(
        base,
        model=f"ibot_vit_{size}_patch{shape.get('patch_size', 16)}_{shape.get('input_size', 224)}",
        batch_size=batch_size,
        global_batch_size=0,
        local_crops=local_crops,
        mask_policy="random" if variant != "hpm_ibot" else "hpm",
        drop_path=0.0,
        view_augment="none",
        deepspeed_config="zero0_fp32",
        **shape,  # type: ignore[arg-type]
    ).resolve(10**6, 1)


def head_memory(recipe: Recipe, samples: int = 64) -> dict[str, float]:
    """MiB of logits and distributions in float32 that a micro-step holds for the patches: of all (as published), and of
    the masked ones alone, of which the most that there can be are kept."""
    rows, most = samples * recipe.global_crops, int(recipe.num_patches * (recipe.mask_ratio + recipe.mask_ratio_spread))
    unit = 4 * recipe.prototypes / 2**20
    # The teacher's logits and their softmax, the student's and their log-softmax.
    return {"published": 4 * rows * recipe.num_patches * unit, "ours": 4 * rows * most * unit}


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.views`."""
    parser = Parser(prog="python -m bench.views", description=__doc__)
    parser.add_argument("--size", choices=("nano", "small", "base"), default="small")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--local_crops", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="JSON with all figures")
    arguments = parser.parse_args(argv)
    shape = (arguments.size, arguments.batch_size, arguments.local_crops)
    with ranks.session() as launch:
        made: dict[str, Callable[[int], None]] = {}
        for variant in VARIANTS:
            say(f"building {variant}")
            recipe = recipe_of(variant, *shape)
            if variant == "eager":
                images, _, local = inputs_of(recipe, lambda size: torch.rand(size))
                made[variant] = eager_update(recipe, *(part.movedim(-1, 1).contiguous() for part in (images, *local)))
            else:
                made[variant] = our_update(recipe, launch)
        seconds, processor = measure(made, arguments.rounds, 1, launch.device)
    found = {name: ratios(processor[one], processor[other]) for name, one, other in RATIOS}
    work = {name: step_flops(model_of(recipe_of(name, *shape)), recipe_of(name, *shape)) for name in VARIANTS[:2]}
    write_json(
        arguments.output,
        {
            "machine": machine(),
            "arguments": {key: str(value) for key, value in vars(arguments).items()},
            "raw_seconds": seconds,
            "raw_processor_seconds": processor,
            "ratios": found,
            "gflop_per_sample": {name: one["total"] / 1e9 for name, one in work.items()},
            "head_mib_at_64": head_memory(recipe_of("ibot", "base", 64, 10)),
        },
    )
    memory = head_memory(recipe_of("ibot", "base", 64, 10))
    print(table(("ratio of processor seconds", "median (low to high)"), [(n, show(v)) for n, v in found.items()]))
    print(f"by arithmetic HPM-iBOT / iBOT {work['hpm_ibot']['total'] / work['ibot']['total']:.3f}")
    print(f"patch logits of 64 samples: {memory['published']:.0f} MiB as published, {memory['ours']:.0f} here at most")


if __name__ == "__main__":
    run_command(main)
