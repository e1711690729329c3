"""What a recipe needs on GPUs that you don't have yet: memory, speed, data, network, time. No GPU is used.

    fasthpm plan hpm_vit_base_in1k_200e --gpus 8 --gpu h100
    fasthpm plan hpm_video_vit_base_k400_800e --gpus 4 --gpu rtx4090 --price 0.4

The step is run without values, operation by operation, as torch would run it on the GPU: its peak of memory is what
torch's allocator would hold, and each operation takes as long as its products or its memory traffic need at the
stated share of the data sheet. Figures of time are a model, not a measurement; `fasthpm doctor` measures.

Without --batch_size the largest batch per GPU is taken that fits and divides the recipe's global_batch_size.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from fasthpm import entry, ranks, recipes
from fasthpm.cli import Arguments, Parser, without_effect
from fasthpm.commands.dry_run import DryRun, dry_run
from fasthpm.data import read_info
from fasthpm.errors import UserError, nearest
from fasthpm.recipe import Recipe, build_recipe
from fasthpm.speed.gpus import GIB, GPU, GPUS, LAUNCH, REACHED_BANDWIDTH, REACHED_FLOPS
from fasthpm.speed.memory import CONTEXT, state_bytes

SAMPLES = {"in1k": 1_281_167, "k400": 240_436, "ssv2": 168_913}  # of training sets, by their part of a recipe's name
USABLE = 0.95  # of a GPU's memory: the allocator leaves gaps
UPDATE_BYTES = 60  # memory traffic per parameter: AdamW, average, casts and copies
ACCUMULATE_BYTES = 10  # the same of adding a micro-step's gradient to the others
HOST = 8e-6  # seconds in which a fast core launches a kernel in eager mode
DECODED = 2848  # images of 256 pixels that a core decodes and crops per second (bench.loader, one EPYC core)


@dataclass(frozen=True, repr=False)
class PlanResult(entry.Result):
    """What a run would need; bytes, seconds, samples per second."""

    gpu: str
    gpus: int
    batch_size: int  # per GPU and micro-step
    accum_iter: int
    global_batch_size: int
    fits: bool
    memory: float  # per GPU, all of it
    activations: float  # the part of them that grows with the batch
    available: float
    step_seconds: float  # an update, with its micro-steps
    bound_by: str  # "the GPU", "kernel launches" or "the network"
    samples_per_second: float  # all GPUs
    network_bytes: float  # that a GPU sends per update
    network_seconds: float
    epoch_seconds: float
    gpu_hours: float  # of the whole schedule
    mfu: float  # products over the data sheet's rate


def plan(recipe: Recipe, gpu: GPU, gpus: int, samples: int, *, per_machine: int, network: float) -> PlanResult:
    """The plan of a recipe whose batch_size is settled.

    - `per_machine`: GPUs of a machine; `network`: bytes per second and GPU between machines
    """
    resolved = recipe.resolve(samples, gpus)
    stage, bf16 = precision(resolved, gpus)
    found = dry_run(resolved, gpu, bf16=bf16)
    memory = used(resolved, found, gpus)
    accumulated = ACCUMULATE_BYTES * found.parameters
    micro = max(found.seconds + gpu.seconds(0, accumulated), HOST * found.kernels)
    update = gpu.seconds(0, UPDATE_BYTES * found.parameters / (gpus if stage else 1))
    sent = network_bytes(found, gpus, bf16=bf16)
    wire = sent / (gpu.link if gpus <= per_machine else min(network, gpu.link))
    seconds = resolved.accum_iter * micro + update + wire
    launches = found.seconds < HOST * found.kernels
    rate = resolved.global_batch_size / seconds
    hours = resolved.total_steps * seconds / 3600
    flop = found.flop * resolved.accum_iter
    return PlanResult(
        gpu=gpu.name,
        gpus=gpus,
        batch_size=resolved.batch_size,
        accum_iter=resolved.accum_iter,
        global_batch_size=resolved.global_batch_size,
        fits=memory <= USABLE * gpu.memory,
        memory=memory,
        activations=found.activations,
        available=gpu.memory,
        step_seconds=seconds,
        bound_by="the network" if wire > seconds / 2 else "kernel launches" if launches else "the GPU",
        samples_per_second=rate,
        network_bytes=sent,
        network_seconds=wire,
        epoch_seconds=resolved.steps_per_epoch * seconds,
        gpu_hours=hours * gpus,
        mfu=flop / seconds / gpu.bf16,
    )


def precision(recipe: Recipe, gpus: int) -> tuple[int, bool]:
    """(ZeRO stage, whether the forward pass is in bfloat16) of a resolved recipe's DeepSpeed JSON."""
    config = ranks.merge_config(recipe.deepspeed_config, recipe, gpus)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    return stage, bool(config.get("bf16", {}).get("enabled", False))


def used(recipe: Recipe, found: DryRun, gpus: int) -> float:
    """Bytes of memory on each GPU."""
    stage, bf16 = precision(recipe, gpus)
    kept = state_bytes(
        found.parameters, found.teacher_parameters, stage=stage, world_size=gpus, bf16=bf16, ema=recipe.uses_teacher
    )
    return found.activations + kept + 2 * found.frozen_parameters + CONTEXT  # a frozen teacher is in bfloat16


def network_bytes(found: DryRun, gpus: int, *, bf16: bool) -> float:
    """Bytes that a GPU sends per update: gradients are summed in float32, weights and teacher gathered."""
    size = 2 if bf16 else 4
    shared = 2 * 4 * found.parameters + size * (found.parameters + found.teacher_parameters)
    return shared * (gpus - 1) / gpus


def fitting_batch(recipe: Recipe, gpu: GPU, gpus: int, samples: int, too_large: DryRun | None = None) -> Recipe:
    """The recipe with the largest batch per GPU that fits and divides its global batch.

    - `too_large`: a dry run of the recipe's own batch, which has shown that it does not fit: smaller ones are tried

    **Raises:** `UserError` if the GPUs cannot share the global batch, or not even one sample fits.
    """
    whole = recipe.global_batch_size or recipe.batch_size * gpus * max(recipe.accum_iter, 1)
    if whole % gpus:
        raise UserError(
            f"global_batch_size {whole} cannot be shared by {gpus} GPUs; take a number of GPUs that divides it, or "
            f"give --global_batch_size"
        )
    share = whole // gpus

    def with_batch(batch: int) -> Recipe:
        return dataclasses.replace(recipe, batch_size=batch, accum_iter=0, global_batch_size=whole)

    batches = [batch for batch in range(share, 0, -1) if share % batch == 0]
    if too_large:
        probe, first = recipe.batch_size, too_large
        batches = [batch for batch in batches if batch < probe]
    else:
        probe = next((batch for batch in batches if batch <= 64), batches[-1])
        first = dry_run(with_batch(probe), gpu, bf16=precision(with_batch(probe).resolve(samples, gpus), gpus)[1])
    rest = used(with_batch(probe).resolve(samples, gpus), first, gpus) - first.activations
    room = USABLE * gpu.memory - rest
    for batch in batches:  # activations are all but proportional to the batch
        if first.activations * batch / probe <= room:
            return with_batch(batch)
    raise UserError(
        f"{recipe.recipe} does not fit a {gpu.name} of {gpu.memory / GIB:.0f} GiB: {rest / GIB:.1f} GiB of weights and "
        f"optimizer, {first.activations / probe / GIB:.2f} GiB of activations per sample; take a GPU with more memory, "
        f"more GPUs with --deepspeed_config zero3_bf16, or --activation_checkpointing"
    )


def text(recipe: Recipe, found: PlanResult, gpu: GPU, samples: int, price: float) -> str:
    """The plan for people."""
    kind = "clips" if recipe.num_frames > 1 else "images"
    batch = (
        f"{found.batch_size} per GPU x {found.gpus} GPUs x accum_iter {found.accum_iter} = {found.global_batch_size}"
    )
    verdict = "fits" if found.fits else "does NOT fit: take a smaller --batch_size"
    rate = found.samples_per_second / found.gpus
    pixels = recipe.image_size[0] * recipe.image_size[1] * recipe.channels * recipe.num_frames
    rows = {
        "batch": batch,
        "memory": (
            f"{found.memory / GIB:.1f} of {found.available / GIB:.0f} GiB per GPU, {verdict} (activations "
            f"{found.activations / GIB:.1f}, weights, optimizer and teacher "
            f"{(found.memory - found.activations - CONTEXT) / GIB:.1f}, context {CONTEXT / GIB:.1f})"
        ),
        "update": f"{found.step_seconds * 1e3:.0f} ms, bound by {found.bound_by}; MFU {found.mfu:.0%}",
        "speed": f"{rate:,.0f} {kind}/s per GPU, {found.samples_per_second:,.0f} in all",
        "data": f"{rate * pixels / 1e9:.2f} GB/s of pixels per GPU"
        + (f"; JPEGs of 256 pixels take about {rate / DECODED:.1f} cores per GPU" * (kind == "images")),
        "network": "none: one GPU"
        if found.gpus == 1
        else f"{found.network_bytes / 1e6:,.0f} MB per GPU and update, {found.network_seconds * 1e3:.1f} ms of it "
        f"waited for",
        "epoch": f"{_time(found.epoch_seconds)} of {samples:,} {kind}",
        "schedule": f"{recipe.epochs} epochs, {_time(recipe.epochs * found.epoch_seconds)}: "
        f"{found.gpu_hours:,.0f} GPU-hours" + (f", {found.gpu_hours * price:,.0f} at {price:g} each" if price else ""),
    }
    head = f"{recipe.recipe} on {found.gpus} x {gpu.name} ({recipe.deepspeed_config})"
    assumed = (
        f"modelled, not measured: {gpu.bf16 * REACHED_FLOPS / 1e12:.0f} TFLOP/s and "
        f"{gpu.bandwidth * REACHED_BANDWIDTH / 1e12:.2f} TB/s reached ({REACHED_FLOPS:.0%} and {REACHED_BANDWIDTH:.0%} "
        f"of the data sheet), {LAUNCH * 1e6:g} us for the shortest kernel, {HOST * 1e6:g} us of the host to launch one"
    )
    return "\n".join([head, *(f"  {name:9} {value}" for name, value in rows.items()), assumed])


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def count_samples(recipe: Recipe, given: int) -> int:
    """Samples of an epoch: as given, of the prepared set, or of the set that the recipe is named after."""
    if given:
        return given
    if recipe.data_path:
        return read_info(recipe.data_path).num_samples
    known = [number for part, number in SAMPLES.items() if part in recipe.recipe.split("_")]
    if not known:
        raise UserError(f"how many samples {recipe.recipe} trains on is not known; give --num_samples or --data_path")
    return known[0]


def main(argv: Arguments = None) -> PlanResult:
    """`fasthpm plan`."""
    parser = Parser(prog="fasthpm plan", description=__doc__)
    parser.add_argument("name", help="a recipe, or a recipe.json")
    parser.add_argument("--gpu", default="h100", help=f"which: {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=1, help="how many, all machines together")
    parser.add_argument("--gpus_per_machine", type=int, default=8, help="more of them talk over the network")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s between machines, per GPU")
    parser.add_argument("--batch_size", type=int, default=0, help="per GPU and micro-step; 0 = the largest that fits")
    parser.add_argument("--global_batch_size", type=int, default=0, help="0 = the recipe's")
    parser.add_argument("--epochs", type=int, default=0, help="0 = the recipe's")
    parser.add_argument(
        "--num_samples", type=int, default=0, help="of an epoch; 0 = of the recipe's set, or --data_path"
    )
    parser.add_argument("--data_path", default="", help="a prepared set, whose samples are counted")
    parser.add_argument("--deepspeed_config", default="", help="preset or file (default: the recipe's)")
    parser.add_argument("--activation_checkpointing", action="store_true", help="as in pretraining")
    parser.add_argument("--price", type=float, default=0.0, help="of a GPU-hour, to print what the schedule costs")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args(argv)
    for name in ("gpus", "gpus_per_machine", "network"):
        if not getattr(arguments, name) > 0:
            raise UserError(f"{name} is {getattr(arguments, name)}, expected more than 0")
    for name in ("num_samples", "batch_size", "global_batch_size", "epochs", "price"):
        if getattr(arguments, name) < 0:
            raise UserError(f"{name} is {getattr(arguments, name)}, expected 0 or more")
    if arguments.num_samples:
        without_effect(["data_path"], "--num_samples says how many samples there are")
    if arguments.json:
        without_effect(["price"], "--json prints GPU-hours and no price")
    if arguments.gpu not in GPUS:
        raise UserError(f"gpu is {arguments.gpu!r}{nearest(arguments.gpu, GPUS)}; expected one of {', '.join(GPUS)}")
    recipe, gpu = _recipe(arguments), GPUS[arguments.gpu]
    samples = count_samples(recipe, arguments.num_samples)
    if not arguments.batch_size:
        recipe = fitting_batch(recipe, gpu, arguments.gpus, samples)
    network = arguments.network * 1e9
    found = plan(recipe, gpu, arguments.gpus, samples, per_machine=arguments.gpus_per_machine, network=network)
    print(
        json.dumps(dataclasses.asdict(found)) if arguments.json else text(recipe, found, gpu, samples, arguments.price)
    )
    return found


def _recipe(arguments: Any) -> Recipe:
    """The recipe with what the command line changes."""
    base = dataclasses.asdict(recipes.from_name(arguments.name))
    names = ("batch_size", "global_batch_size", "epochs", "data_path", "deepspeed_config", "activation_checkpointing")
    changes = {name: value for name in names if (value := getattr(arguments, name))}
    if "batch_size" in changes and "global_batch_size" not in changes:
        changes["accum_iter"] = 0
    return build_recipe({**base, **changes}, source="command line")
