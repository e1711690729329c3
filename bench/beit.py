"""Steps of BEiT, interleaved: plain, with HPM by each way to ask, and as published code is built.

    python -m bench.beit [--size small] [--batch_size 8] [--precision bf16] [--rounds 5] [--products 2] [-o beit.json]

All predict tokens of a k-means codebook with random codes; DALL-E's would add as much to every variant. `eager_beit`
computes the same function as `beit` step by step: explicit attention, all places through all blocks, boolean gathers,
autocast, AdamW without fusing, tokens of the whole image (published code has a tokenizer that sees it whole, ours
looks up the masked patches); masks are ready. The variants take turns within a round, and a ratio is the median of the
rounds' ratios.

--products N measures, in N further updates on a CPU, how much processor time goes into products of matrices and
attention. Nothing but less arithmetic, or a faster library, makes that shorter: the eager step's time over it bounds
what can be won.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.baselines import EPS, EagerBlock
from bench.common import json_file, ratios, show, table, write_json
from bench.step import ALPHA, CONFIGS, INFO, SIZES, measure, pixels
from fasthpm import ranks, recipes
from fasthpm.cli import Parser, run_command
from fasthpm.difficulty import HEAD
from fasthpm.errors import UserError
from fasthpm.mask import draw_mask, sample_noise
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.speed import flops
from fasthpm.step import Step
from fasthpm.teacher import EMATeacher
from fasthpm.tokenizers import Codebook

Update = Callable[[int], None]
ALONE: dict[str, Any] = {"predict_loss": "none", "predictor_depth": 0}
VARIANTS: dict[str, dict[str, Any]] = {  # changes to the recipe with HPM; empty = plain
    "beit": {},
    "hpm_in_place": {"difficulty": "in_place", **ALONE},
    "hpm_measured": {"difficulty": "measured", **ALONE},
    "hpm_paper": {"difficulty": "paper"},
}
RATIOS = (  # over, and the goal for HPM in place and for plain BEiT
    *((name, "beit") for name in VARIANTS if name != "beit"),
    *(("eager_beit", name) for name in VARIANTS),
)

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


class Products(TorchDispatchMode):
    """Processor seconds of the operations that run while it is entered: products, attention included, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.others = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.thread_time()
        found = function(*args, **(kwargs or {}))
        taken, name = time.thread_time() - begin, function._schema.name.split("::")[1]
        if name in PRODUCTS or name.startswith("_scaled_dot_product"):
            self.products += taken
        else:
            self.others += taken
        return found


def product_seconds(updates: dict[str, Update], count: int) -> dict[str, dict[str, float]]:
    """{variant: {"products", "others"}}: processor seconds per update, over `count` updates of each in turns."""
    sums = {name: Products() for name in updates}
    for number in range(count):
        for name, update in updates.items():
            with sums[name]:
                update(number)
    return {name: {"products": mode.products / count, "others": mode.others / count} for name, mode in sums.items()}


def eager_flops(student: HPMViT, recipe: Recipe, book: Codebook) -> float:
    """FLOPs per image of `EagerBEiT`'s step, by the rule of `speed.flops`."""
    head = flops.linear_flops(recipe.num_masked, student.embed_dim, recipe.frozen_dim)
    return 3 * (flops.encoder_flops(student, recipe.num_patches) + head) + book.flops(recipe.num_patches)


def recipe_of(variant: str, arguments: argparse.Namespace, config: str) -> Recipe:
    """The recipe of a variant at the bench's size and batch."""
    base = recipes.from_name("hpm_beit_vit_base_in1k_200e" if VARIANTS[variant] else "beit_vit_base_in1k_800e")
    fields: dict[str, Any] = {"model": base.model.replace(SIZES["base"], f"vit_{arguments.size}_patch16_224")}
    if arguments.size == "nano":
        fields = {"model": "beit_vit_nano_patch4_28", "input_size": "28", "patch_size": 4}
        fields |= {"decoder_dim": 64, "decoder_heads": 4}
    fields |= {"batch_size": arguments.batch_size, "global_batch_size": 0, "deepspeed_config": config}
    fields |= {"target_dim": arguments.tokens, "drop_path": 0.0, "color_jitter": 0.0, **VARIANTS[variant]}
    return dataclasses.replace(base, **fields).resolve(10**6, 1)


def codebook(recipe: Recipe) -> Codebook:
    """Random codes."""
    torch.manual_seed(0)
    codes = torch.randn(recipe.frozen_dim, recipe.patch_size**2 * recipe.channels)
    return Codebook(codes, recipe.patch_size, INFO.mean, INFO.std)


def ours(recipe: Recipe, launch: ranks.Launch) -> tuple[Update, float]:
    """A whole update through the engine, and its FLOPs per image."""
    step = Step(model_of(recipe), recipe, INFO)
    engine = ranks.build_engine(step, recipe, ranks.merge_config(recipe.deepspeed_config, recipe, 1), launch)
    book = codebook(recipe).to(launch.device)
    step.attach_frozen(book)
    if recipe.uses_teacher:
        teacher = EMATeacher(engine, step.student, "student.", model_of(recipe), 0.999, HEAD)
        step.attach_teacher(teacher.module)
    images, ids = pixels(recipe, launch.device), torch.arange(recipe.batch_size, device=launch.device)

    def update(number: int) -> None:
        alpha = torch.full((), ALPHA, dtype=torch.float64, device=launch.device)
        output = engine(images, ids, torch.full((), number, device=launch.device), alpha)
        engine.backward(output.loss)
        engine.step()

    return update, flops.step_flops(step.student, recipe, book)["total"]


class EagerBEiT(nn.Module):
    """BEiT as published code builds it, with absolute positions."""

    def __init__(self, student: Any, tokens: int) -> None:
        super().__init__()
        dim, side = student.embed_dim, student.patch_size
        self.patch_embed = nn.Conv2d(student.in_chans, dim, side, side)
        self.cls_token = nn.Parameter(student.cls_token.detach().clone())
        self.mask_token = nn.Parameter(student.mask_token.detach().clone())
        self.pos_embed = nn.Parameter(student.pos_embed.detach().clone())
        self.blocks = nn.ModuleList(EagerBlock(dim, student.num_heads) for _ in student.blocks)
        self.norm, self.head = nn.LayerNorm(dim, EPS), nn.Linear(dim, tokens)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """[B, C, H, W] and bool [B, L] -> logits of the masked places, [B * M, K]."""
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        share = mask[:, :, None].type_as(tokens)
        tokens = tokens * (1 - share) + self.mask_token.expand(len(tokens), tokens.shape[1], -1) * share
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 1:][mask])


def eager(recipe: Recipe, device: torch.device, half: bool) -> tuple[Update, float]:
    """A whole update of `EagerBEiT`, and its FLOPs per image."""
    student, book = model_of(recipe), codebook(recipe).to(device)
    model, work = EagerBEiT(student, recipe.frozen_dim).to(device), eager_flops(student, recipe, book)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(recipe.beta1, recipe.beta2), weight_decay=0.05)
    images = pixels(recipe, device)
    floats = images.movedim(-1, 1).float().div(127.5).sub(1).contiguous()
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=half and dtype == torch.float16)

    def update(number: int) -> None:
        noise = sample_noise(0, torch.tensor(number), torch.arange(len(images)), recipe.mask_plan.noise_size)
        mask = draw_mask(recipe.mask_plan, noise).to(device)
        with torch.no_grad():
            labels = book(images)[mask]
        with torch.autocast(device.type, dtype, enabled=half):
            loss = F.cross_entropy(model(floats, mask), labels)
        loss.item()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return update, work


def run(arguments: argparse.Namespace, launch: ranks.Launch) -> dict[str, Any]:
    """The figures of one precision."""
    half, config = arguments.precision == "bf16", CONFIGS[arguments.precision]
    updates: dict[str, Update] = {}
    work: dict[str, float] = {}
    for name in arguments.variants:
        if name == "eager_beit":
            updates[name], work[name] = eager(recipe_of("beit", arguments, config), launch.device, half)
        else:
            updates[name], work[name] = ours(recipe_of(name, arguments, config), launch)
    seconds, cpu_seconds = measure(updates, arguments.rounds, arguments.repeats, launch.device)
    pairs = [(a, b) for a, b in RATIOS if a in seconds and b in seconds]
    return {
        "product_seconds": product_seconds(updates, arguments.products) if arguments.products else {},
        "bench": "beit",
        **{name: getattr(arguments, name) for name in ("size", "batch_size", "precision", "rounds", "tokens")},
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "gflops_per_image": {name: value / 1e9 for name, value in work.items()},
        "ratios": {f"{a} / {b}": ratios(seconds[a], seconds[b]) for a, b in pairs},
        "cpu_ratios": {f"{a} / {b}": ratios(cpu_seconds[a], cpu_seconds[b]) for a, b in pairs},
        "flop_ratios": {f"{a} / {b}": work[a] / work[b] for a, b in pairs if a in work and b in work},
    }


def report(result: dict[str, Any]) -> str:
    """Markdown: times, then ratios."""
    flop = result["gflops_per_image"]
    rows = [[name, f"{s:.3f}", f"{flop.get(name, 0):.1f}"] for name, s in result["median_seconds"].items()]
    found = [
        [name, show(value), show(result["cpu_ratios"][name]), f"{result['flop_ratios'].get(name, 0):.2f}"]
        for name, value in result["ratios"].items()
    ]
    header = ("ratio", "of time, median (range)", "of processor time", "of FLOPs")
    tables = [table(("step", "s", "GFLOP per image"), rows), table(header, found)]
    if parts := result["product_seconds"]:
        total = {name: sum(part.values()) for name, part in parts.items()}
        shares = [
            [name, f"{part['products']:.2f}", f"{part['others']:.2f}", f"{100 * part['products'] / total[name]:.0f}"]
            + ([f"{total['eager_beit'] / part['products']:.2f}"] if "eager_beit" in total else [""])
            for name, part in parts.items()
        ]
        heads = ("step", "products, s", "others, s", "products, percent", "eager over it, were its others free")
        tables.append(table(heads, shares))
    return "\n\n".join(tables)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.beit`."""
    parser = Parser(prog="python -m bench.beit", description=__doc__)
    parser.add_argument("--size", choices=("nano", "small", "base", "large"), default="base")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--precision", choices=tuple(CONFIGS), default="bf16")
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, "eager_beit"), default=[*VARIANTS, "eager_beit"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="updates per round and variant")
    parser.add_argument("--products", type=int, default=0, help="updates in which products are timed by themselves")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    arguments = parser.parse_args(argv)
    if min(arguments.batch_size, arguments.rounds, arguments.repeats) < 1:
        raise UserError("batch_size, rounds and repeats must be 1 or more")
    with ranks.session() as launch:
        if arguments.products and launch.device.type != "cpu":
            raise UserError("products are timed on CPUs, where an operation ends before the next begins; leave it out")
        result = run(arguments, launch)
    print(report(result))
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    run_command(main)
