"""The parts of `bench.gpu`: each measures one thing with `bench.step`'s steps.

They put what they find into a dictionary as they go, so that a part that fails or is cut off keeps what it had.
"""

import argparse
import gc
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import step
from fasthpm import loss as losses
from fasthpm import ranks
from fasthpm.difficulty import HEAD
from fasthpm.patches import model_of
from fasthpm.ranks.launch import Launch
from fasthpm.recipe import Recipe
from fasthpm.run.metrics import measure_matmul_rate, wait_for
from fasthpm.run.versions import versions
from fasthpm.step import Step

# MAE, and HPM in its forms; the last two are one form, asked in two ways.
FORMS = ("mae", "hpm", "hpm_fast", "measured_maps", "in_place_alone", "measured_alone")
LARGE_TENSOR = 2**20  # bytes; smaller ones may be constants that functions keep
KERNELS = 40  # of a profile
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
SHAPES = {  # of attention: samples over those of a batch, tokens, heads, their width, whether a backward pass follows
    "encoder": (1.0, 50, 12, 64, True),
    "teacher": (1.0, 197, 12, 64, False),
    "decoder": (1.0, 197, 16, 32, True),
    "encoder of clips": (0.125, 160, 12, 64, True),
    "teacher of clips": (0.125, 1568, 12, 64, False),
    "decoder of clips": (0.125, 1568, 6, 64, True),
}


Found = dict[str, Any]  # what a part has found, as JSON can hold it


class AbsentError(Exception):
    """What a part is about is not there; the message says what."""


@dataclass(frozen=True)
class Settings:
    """How large everything is."""

    launch: Launch
    size: str = "base"
    large: str = "large"
    batch: int = 256
    large_batch: int = 128
    video_batch: int = 32
    graph_batches: tuple[int, ...] = (64, 256)
    sweep: tuple[int, ...] = (64, 128, 256, 512)
    rounds: int = 3
    repeats: int = 5
    seconds: float = 0.3  # for each of many small things

    @property
    def device(self) -> torch.device:
        """Where it all runs."""
        return self.launch.device


def rehearsal(launch: Launch) -> Settings:
    """The smallest sizes: what is seen is that everything runs."""
    return Settings(launch, "nano", "nano", 4, 2, 2, (2,), (2, 4), 1, 1, 0.0)


# ------------------------------------------------------------------------------------------------------ shared
def timed(settings: Settings, *variants: str, **changes: Any) -> dict[str, Any]:
    """`bench.step`'s figures of some variants in bf16, in turns.

    - `changes`: other arguments of it; `fields` are changes of the recipes
    """
    arguments = argparse.Namespace(size=settings.size, video=False, batch_size=settings.batch, compile=False, fields={})
    vars(arguments).update(rounds=settings.rounds, repeats=settings.repeats, variants=variants, loop=False)
    vars(arguments).update(changes)
    begin = time.perf_counter()
    found = step.one_precision("bf16", arguments, settings.launch)
    names = ("median_seconds", "images_per_second", "ratios", "mfu", "memory_gib", "cpu_seconds", "raw_seconds")
    whole = time.perf_counter() - begin  # with building, warming up and compiling
    kernels = {"attention": found["attention"]} if found["attention"] else {}
    return {
        "batch_size": arguments.batch_size,
        **{name: found[name] for name in names},
        **kernels,
        "whole_seconds": whole,
    }


def release(device: torch.device) -> None:
    """Give the GPU's memory back: DeepSpeed's engines are held by hooks, and do not go with their names."""
    gc.collect()
    if device.type != "cuda":
        return
    for found in gc.get_objects():
        with suppress(Exception):
            if type(found) in (Tensor, torch.nn.Parameter) and found.is_cuda:
                storage = found.untyped_storage()
                if storage.nbytes() >= LARGE_TENSOR:
                    storage.resize_(0)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def per_call(function: Callable[[], object], settings: Settings) -> float:
    """Seconds of a call, over about `settings.seconds`, after two that are not counted."""
    for _ in range(2):
        function()
    wait_for(settings.device)
    begin, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - begin < settings.seconds:
        for _ in range(10 if settings.seconds else 1):
            function()
            calls += 1
        wait_for(settings.device)
    return (time.perf_counter() - begin) / calls


# ------------------------------------------------------------------------------------------------------ the parts
def machine(settings: Settings, found: Found) -> None:
    """What this is, and what it reaches: large products, memory."""
    device = settings.device
    rates = {}
    for size in (2048, 8192) if settings.seconds else (64,):
        rates[str(size)] = measure_matmul_rate(device, torch.bfloat16, size) / 1e12
    block = torch.zeros(2**28 if settings.seconds else 2**10, device=device)
    other = torch.empty_like(block)
    moved = 2 * block.nbytes / per_call(lambda: other.copy_(block), settings) / 1e12
    said, pack = "", Path(__file__).parents[1] / "build" / "gpu_pack" / "commit"
    with suppress(OSError):
        found["packed"] = pack.read_text().strip()
    with suppress(OSError):
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=False).stdout
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0
    found.update(versions=versions(device, 1), memory_gib=memory, nvidia_smi=said)
    found.update(matmul_tflops=rates, copy_tb_per_second=moved)


def correctness(settings: Settings, found: Found) -> None:
    """The device against this machine's CPU in float32: masks, losses, gradients; and the ranking loss of all pairs."""
    checks = found["checks"] = []
    for variant, video in (
        ("mae", False),
        ("measured_maps", False),
        ("hpm", False),
        ("in_place", False),
        ("mae", True),
    ):
        arguments = argparse.Namespace(size="nano", video=video, batch_size=8)
        recipe = step.recipe_of(variant, arguments, "zero0_fp32")
        name = f"{variant}{' of clips' * video}"
        (mask, loss, gradient), (their_mask, their_loss, their_gradient) = (
            learnt(recipe, place) for place in (torch.device("cpu"), settings.device)
        )
        same = float((mask == their_mask).all(1).float().mean())
        free = recipe.uses_teacher and not recipe.teacher_maps  # ties of its difficulty may fall either way
        checks.append(check(f"{name}: share of samples with other masks", 1 - same, 0.25 if free else 0.0))
        checks.append(check(f"{name}: loss", abs(their_loss - loss) / abs(loss), 1e-2 if same < 1 else 1e-4))
        off = float((their_gradient - gradient).norm() / gradient.norm())
        checks.append(check(f"{name}: gradient", off, 0.5 if same < 1 else 1e-3))
        half = learnt(recipe, settings.device, torch.bfloat16)[1]
        checks.append(check(f"{name}: loss in bf16", abs(half - loss) / abs(loss), 0.03))
    for batch, masked in ((256, 147), (32, 1411)) if settings.seconds else ((4, 9),):
        checks += ranked(batch, masked, settings.device)


def check(what: str, error: float, bound: float) -> dict[str, Any]:
    """One comparison."""
    return {"what": what, "error": error, "bound": bound, "good": error <= bound}


def learnt(recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float, Tensor]:
    """Mask, loss and gradient of a step on fixed images, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = model_of(recipe), model_of(recipe)
    with torch.no_grad():
        for one in (student, teacher):
            for weight in one.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    made = Step(student.to(device, dtype), recipe, step.INFO)
    if recipe.uses_teacher:
        made.attach_teacher(teacher.to(device, dtype).eval().requires_grad_(False))
    images = step.pixels(recipe, device)
    scores = torch.rand(recipe.batch_size, recipe.num_patches, generator=generator) if recipe.teacher_maps else None
    output = made(
        images,
        torch.arange(recipe.batch_size, device=device),
        torch.full((), 3, device=device),
        torch.full((), step.ALPHA, dtype=torch.float64, device=device),
        None if scores is None else scores.to(device),
    )
    output.loss.backward()
    weights = [weight for name, weight in student.named_parameters() if HEAD not in name and weight.grad is not None]
    gradient = torch.cat([weight.grad.flatten().float().cpu() for weight in weights if weight.grad is not None])
    return output.mask.cpu(), float(output.loss.detach()), gradient


def ranked(batch: int, masked: int, device: torch.device) -> list[dict[str, Any]]:
    """The ranking loss and its gradient as the device computes them, by Triton where it is there, against the CPU's."""
    generator = torch.Generator().manual_seed(2)
    predicted, actual = (torch.randn(batch, masked, generator=generator) for _ in range(2))
    actual[:, 1] = actual[:, 0]  # a tie
    values, gradients = [], []
    for place in (torch.device("cpu"), device):
        here = predicted.to(place, copy=True).requires_grad_()
        value = losses.ranking_loss(here, actual.to(place))
        value.backward()
        values.append(float(value.detach()))
        gradients.append(here.grad.cpu())  # type: ignore[union-attr]
    off = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    name = f"ranking loss of {batch} x {masked}"
    return [check(name, abs(values[1] - values[0]) / values[0], 1e-5), check(f"{name}: gradient", off, 1e-4)]


def steps(settings: Settings, found: Found) -> None:
    """MAE, and HPM in five forms, beside both as published code is built."""
    try:
        found.update(timed(settings, *FORMS, *step.EAGER))
    except Exception as error:  # of the baselines, perhaps: ours are worth knowing without them
        found["without_baselines"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        release(settings.device)
        found.update(timed(settings, *FORMS))


def profile(settings: Settings, found: Found) -> None:
    """Three updates of exact HPM by kernel."""
    arguments = argparse.Namespace(size=settings.size, video=False, batch_size=settings.batch)
    update = step.build("hpm", step.recipe_of("hpm", arguments, step.CONFIGS["bf16"]), settings.launch, "bf16").update
    for number in range(4):
        update(number)
    wait_for(settings.device)
    gpu = settings.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
    begin = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        for number in range(3):
            update(number)
        wait_for(settings.device)
    wall = (time.perf_counter() - begin) / 3
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    rows = []
    for event in profiler.key_averages():
        if event.device_type == kind:
            taken = event.self_device_time_total if gpu else event.self_cpu_time_total
            rows.append({"kernel": event.key[:160], "calls": event.count / 3, "ms": taken / 3e3})
    rows.sort(key=lambda row: -row["ms"])
    total = sum(row["ms"] for row in rows)
    calls = sum(row["calls"] for row in rows)
    found.update(wall_ms=wall * 1e3, kernel_ms=total, kernels=calls, rows=rows[:KERNELS])


def attention(settings: Settings, found: Found) -> None:
    """Milliseconds of attention by torch's backends, for every shape of ViT-B's step."""
    kinds = found["ms"] = {}
    for name, (share, tokens, heads, width, training) in SHAPES.items():
        if not settings.seconds:
            tokens, heads = 9, 2
        rows = max(int(settings.batch * share), 1)
        made = torch.randn(rows, tokens, 3, heads, width, device=settings.device, dtype=torch.bfloat16)
        parts = [part.transpose(1, 2).detach().requires_grad_(training) for part in made.unbind(2)]
        slope = torch.randn_like(parts[0])

        def run(parts: list[Tensor] = parts, slope: Tensor = slope, training: bool = training) -> None:
            query, key, value = parts
            out = F.scaled_dot_product_attention(query, key, value)
            if training:
                torch.autograd.grad(out, parts, slope)

        kinds[name] = {"torch's own choice": per_call(run, settings) * 1e3}
        for backend in BACKENDS:
            try:
                with sdpa_kernel(getattr(SDPBackend, backend)), torch.set_grad_enabled(training):
                    kinds[name][backend.partition("_")[0].lower()] = per_call(run, settings) * 1e3
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # none of this kind for this shape
                kinds[name][backend.partition("_")[0].lower()] = str(error).partition("\n")[0][:80]


def timers(settings: Settings, found: Found) -> None:
    """Exact HPM with DeepSpeed's throughput timer, which waits for the device twice in a micro-step, and without."""
    real, small = ranks.merge_config, settings.graph_batches[0]
    fields = {"cuda_graph": "off"}  # a graph asks no timer

    def with_timer(*arguments: Any) -> dict[str, Any]:
        return {**real(*arguments), "timers": {"throughput": {"enabled": True, "synchronized": True}}}

    found["off"] = timed(settings, "mae", "hpm", batch_size=small, fields=fields)
    release(settings.device)
    with mock.patch.object(ranks, "merge_config", with_timer):
        found["on"] = timed(settings, "mae", "hpm", batch_size=small, fields=fields)


def graph(settings: Settings, found: Found) -> None:
    """MAE's and exact HPM's update as one CUDA graph, and launched kernel by kernel."""
    for batch in settings.graph_batches:
        for asked in ("on", "off"):
            found[f"{batch}, {asked}"] = timed(settings, "mae", "hpm", batch_size=batch, fields={"cuda_graph": asked})
            release(settings.device)


def sweep(settings: Settings, found: Found) -> None:
    """Exact HPM by batch."""
    for batch in settings.sweep:
        try:
            found[str(batch)] = timed(settings, "hpm", batch_size=batch)
        except torch.OutOfMemoryError as error:
            found[str(batch)] = {"error": str(error).partition("\n")[0][:160]}
        release(settings.device)


def compiled(settings: Settings, found: Found) -> None:
    """Exact HPM with --compile; `whole_seconds` holds the compilation."""
    if settings.device.type == "cpu":
        raise AbsentError("compiling for a CPU takes minutes and says nothing of a GPU")
    found.update(timed(settings, "hpm", compile=True))


def video(settings: Settings, found: Found) -> None:
    """Clips of 16 frames: VideoMAE and exact HPM."""
    found.update(timed(settings, "mae", "hpm", video=True, batch_size=settings.video_batch))


def large(settings: Settings, found: Found) -> None:
    """ViT-L: MAE and exact HPM."""
    found.update(timed(settings, "mae", "hpm", size=settings.large, batch_size=settings.large_batch))
