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
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from bench.baselines import EPS, EagerBlock
from bench.common import json_file, machine, ratios, say, show, table, write_json
from bench.eager import average
from bench.step import INFO, measure
from fasthpm import ranks, recipes, schedule
from fasthpm.cli import Parser, run_command
from fasthpm.commands.dry_run import Meter
from fasthpm.difficulty import HEAD
from fasthpm.mask_counts import CountPlan
from fasthpm.patches import model_of, width_of
from fasthpm.projection import BOTTLENECK, ProjectionHead, cross_entropy, mean_logits, sharpened, teacher_logits
from fasthpm.recipe import Recipe
from fasthpm.speed import graph
from fasthpm.speed.flops import step_flops
from fasthpm.speed.gpus import GPUS
from fasthpm.teacher import EMATeacher
from fasthpm.views import inputs_of, loss_across_views, step_of

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


def eager_targets(logits: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's distributions of cls [B, K] and of all patches [B, L, K]; the centres [2, K] move."""
    means = torch.stack([logits[:, 0].mean(0), logits[:, 1:].mean((0, 1))])
    cls, patches = (((part - centre[k]) / 0.07).softmax(-1) for k, part in enumerate((logits[:, 0], logits[:, 1:])))
    centre.lerp_(means, 0.1)
    return cls, patches


def eager_losses(
    wanted: tuple[Tensor, Tensor], ours: Tensor, crops: Tensor, mask: Tensor, counts: tuple[int, int]
) -> Tensor:
    """iBOT's loss by loops over pairs of views.

    - `wanted`: of `eager_targets`; `ours`: the student's logits of all tokens, [B, 1 + L, K]; `crops`: of the local
      crops' cls, [R, K]; `mask`: bool [B, L]; `counts`: global and local crops of an image
    """
    views, small = counts
    wanted_cls, wanted_patches = (part.chunk(views) for part in wanted)
    seen = [*(ours[:, 0] / 0.1).chunk(views), *(crops / 0.1).chunk(small)]
    patches, masks = (ours[:, 1:] / 0.1).chunk(views), mask.float().chunk(views)
    cls, patch = [], []
    for q in range(views):
        for v in range(len(seen)):
            if v == q:
                each = -(wanted_patches[q] * patches[v].log_softmax(-1)).sum(-1)
                patch.append(((each * masks[v]).sum(-1) / masks[v].sum(-1).clamp(min=1)).mean())
            else:
                cls.append(-(wanted_cls[q] * seen[v].log_softmax(-1)).sum(-1).mean())
    return torch.stack(cls).mean() + torch.stack(patch).mean()


def eager_update(recipe: Recipe, images: Tensor, local: Tensor) -> Callable[[int], None]:
    """One update on normalised crops [S V, C, H, W] and [S n, C, h, w], V at first."""
    student = EagerIBOT(model_of(recipe))
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    views, small = recipe.global_crops, recipe.local_crops
    centre = torch.zeros(2, recipe.prototypes)

    def losses(mask: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = eager_targets(teacher(images), centre)
        return eager_losses(wanted, student(images, mask), student(local)[:, 0], mask, (views, small))

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


def head_memory(recipe: Recipe) -> dict[str, float]:
    """MiB at the peak of a forward and backward pass of both heads and the losses, in float32, beside weights and the
    tokens that enter: as published, which makes logits of all patches, and ours, which makes those that losses need.

    Measured on tensors without values, allocated and freed as the real ones would be.
    """
    return {"published": _peak(recipe, _published_heads), "ours": _peak(recipe, _our_heads)}


def _peak(recipe: Recipe, losses: Callable[[Recipe, ProjectionHead, ProjectionHead, Tensor, Tensor], Tensor]) -> float:
    """Of `losses` of (recipe, student's head, teacher's head, tokens [B, 1 + L, D], cls tokens of local crops)."""
    width, rows = width_of(recipe.model), recipe.batch_size * recipe.global_crops
    with FakeTensorMode(allow_non_fake_inputs=True), Meter(next(iter(GPUS.values()))) as meter:
        heads = [ProjectionHead(width, recipe.prototypes, recipe.head_hidden) for _ in range(2)]
        tokens = torch.empty(rows, 1 + recipe.num_patches, width, requires_grad=True)
        local = torch.empty(recipe.batch_size * recipe.local_crops, width, requires_grad=True)
        for weight in (*heads[0].parameters(), *heads[1].parameters()):
            weight.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
        meter.live = meter.peak = 0.0
        losses(recipe, heads[0], heads[1].requires_grad_(False), tokens, local).backward()
    return meter.peak / 2**20


def _published_heads(
    recipe: Recipe, student: ProjectionHead, teacher: ProjectionHead, tokens: Tensor, local: Tensor
) -> Tensor:
    mask = torch.empty(len(tokens), recipe.num_patches, dtype=torch.bool)
    with torch.no_grad():
        wanted = eager_targets(teacher(tokens), torch.empty(2, recipe.prototypes))
    return eager_losses(wanted, student(tokens), student(local), mask, (recipe.global_crops, recipe.local_crops))


def _our_heads(
    recipe: Recipe, student: ProjectionHead, teacher: ProjectionHead, tokens: Tensor, local: Tensor
) -> Tensor:
    """As `ViewStep` does it."""
    most = CountPlan(recipe.mask_ratio, recipe.mask_ratio_spread, recipe.unmasked_share, recipe.num_patches).most
    places = torch.empty(len(tokens), most, dtype=torch.int64)[:, :, None].expand(-1, -1, tokens.shape[2])
    with torch.no_grad():
        entering = teacher.bottleneck(tokens)
        mean_logits(teacher, entering)
        masked = entering[:, 1:].gather(1, places[:, :, : entering.shape[2]])
        logits = teacher_logits(teacher, torch.cat([entering[:, :1], masked], 1))
        centre = torch.empty(2, recipe.prototypes)
        cls, patches = (sharpened(part, centre[k], 0.07) for k, part in enumerate((logits[:, 0], logits[:, 1:])))
        del logits
    count = len(tokens) + len(local)
    rows = torch.cat([tokens[:, 0], local, tokens[:, 1:].gather(1, places).flatten(0, 1)])
    found = student(rows)
    per_patch = cross_entropy(found[count:].unflatten(0, (len(tokens), most)), patches)
    return loss_across_views(found[:count], cls, recipe.global_crops) + per_patch.mean()


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.views`."""
    parser = Parser(prog="python -m bench.views", description=__doc__)
    parser.add_argument("--size", choices=("nano", "small", "base"), default="small")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--local_crops", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=json_file, help="JSON with all figures")
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
    memory = head_memory(recipe_of("ibot", "base", 64, 10))
    write_json(
        arguments.output,
        {
            "machine": machine(),
            "arguments": {key: str(value) for key, value in vars(arguments).items()},
            "raw_seconds": seconds,
            "raw_processor_seconds": processor,
            "ratios": found,
            "gflop_per_sample": {name: one["total"] / 1e9 for name, one in work.items()},
            "head_mib_at_64": memory,
        },
    )
    print(table(("ratio of processor seconds", "median (low to high)"), [(n, show(v)) for n, v in found.items()]))
    print(f"by arithmetic HPM-iBOT / iBOT {work['hpm_ibot']['total'] / work['ibot']['total']:.3f}")
    print(f"heads and losses of 64 samples: {memory['published']:.0f} MiB as published, {memory['ours']:.0f} here")


if __name__ == "__main__":
    run_command(main)
