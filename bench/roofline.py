"""What the hardware allows: ideal and realistic speed, HPM over MAE, epochs, data, and traffic, by arithmetic.

    python -m bench.roofline [--tflops 790] [--bandwidth 4.3] [--results bench/results/step.json] [-o roofline.json]

FLOPs follow `fasthpm.speed.flops`. "ideal": FLOPs at the rate of large matrix products; "realistic": those at 80 % of
it, and besides it 38 bytes of memory traffic per token, channel, block and pass (norms, residuals, GELU, softmax in
fused kernels) at 80 % of the bandwidth. The defaults are a model of one H200; put in what `bench.step` measures.
With --results, measured steps stand beside the model's of the machine that they were taken on.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import json_file, table, write_json
from bench.methods import METHODS
from fasthpm.cli import Parser, run_command
from fasthpm.difficulty import HEAD_SHARE
from fasthpm.errors import UserError
from fasthpm.recipes import FAST_REFRESH_EPOCHS
from fasthpm.speed.flops import blocks_flops, cross_flops, last_block_saving
from fasthpm.speed.traffic import TRAFFIC

REACHED = 0.8  # share of matmul rate and of bandwidth, "realistic"
LOOKS = 2  # of the teacher that measures losses, where half of the patches or more are masked
GPUS = (1, 8, 64)
LINKS = {"NVLink": 370e9, "InfiniBand": 45e9}  # bytes per second and GPU
DECODING = {"JPEG to 500": 914, "JPEG to 256": 2848, "raw 256": 4688}  # images per second and core, bench.loader
SCALED = ("mae", "hpm", "hpm_fast", "measured_alone", "measured_maps", "measured_fast")  # in the table of epochs


@dataclass(frozen=True)
class Shape:
    """A model and its data; `seen` counts prefix tokens."""

    name: str
    dim: int
    depth: int
    decoder_dim: int
    decoder_depth: int
    patches: int
    masked: int
    values: int  # of a patch
    prefix: int  # cls tokens
    batch: int  # per GPU
    samples: int  # of an epoch
    sample_bytes: int

    @property
    def seen(self) -> int:
        """Tokens of the student's encoder."""
        return self.patches - self.masked + self.prefix


IMAGE, CLIP = 224 * 224 * 3, 16 * 224 * 224 * 3
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("base", 768, 12, 512, 8, 196, 147, 768, 1, 512, 1_281_167, IMAGE),
        Shape("large", 1024, 24, 512, 8, 196, 147, 768, 1, 512, 1_281_167, IMAGE),
        Shape("huge", 1280, 32, 512, 8, 256, 192, 588, 1, 256, 1_281_167, IMAGE),
        Shape("video_base", 768, 12, 384, 4, 1568, 1408, 1536, 0, 64, 240_436, CLIP),
        Shape("video_large", 1024, 24, 512, 12, 1568, 1408, 1536, 0, 64, 240_436, CLIP),
    )
}


def encoder(shape: Shape, tokens: int, decoded: bool = True) -> float:
    """FLOPs of the encoder on `tokens` tokens with its patch embedding, and map to the decoder's width if `decoded`."""
    embed = 2 * (tokens - shape.prefix) * shape.dim * shape.values
    narrowed = 2 * tokens * shape.dim * shape.decoder_dim if decoded else 0
    return embed + blocks_flops(shape.depth, tokens, shape.dim) + narrowed


def decoder(shape: Shape, outputs: int, cross: bool, seen: int, asked: int) -> float:
    """FLOPs of one decoder's blocks that give `outputs` tokens."""
    if cross:
        return cross_flops(shape.decoder_depth, outputs, seen, shape.decoder_dim)
    whole = blocks_flops(shape.decoder_depth, seen + asked, shape.decoder_dim)
    return whole - last_block_saving(seen + asked, outputs, shape.decoder_dim)


def work(shape: Shape, name: str, refresh: int = FAST_REFRESH_EPOCHS) -> dict[str, float]:
    """FLOPs per sample of a step, as `fasthpm.speed.flops.step_flops`; kept maps: a teacher every `refresh` epochs."""
    method, width = METHODS[name], shape.decoder_dim
    decoders = 2 if method.predictor == "separate" else 1
    one = decoder(shape, shape.masked, method.cross, shape.seen, shape.masked)
    heads = 2 * shape.masked * width * (shape.values + (method.predictor != "none"))
    student = encoder(shape, shape.seen) + decoders * one + heads
    everything, half = shape.patches + shape.prefix, shape.patches // LOOKS
    head = 2 * shape.patches * shape.dim * (shape.dim + 1) if method.difficulty == "in_place" else 0.0
    query = method.difficulty == "masked_query" and not method.cross
    known, asked = (shape.seen, shape.patches) if query else (everything, 0)
    answer = decoder(shape, shape.patches, method.cross, known, asked) + 2 * shape.patches * width
    look = decoder(shape, half, method.cross, shape.seen, half) + 2 * half * width * shape.values
    teacher = {
        "": 0.0,
        "paper": encoder(shape, everything) + answer,
        "masked_query": encoder(shape, everything) + answer,
        "in_place": encoder(shape, everything, decoded=False) + head,
        "measured": LOOKS * (encoder(shape, shape.seen) + look),
    }[method.difficulty]
    if method.maps:
        head /= HEAD_SHARE
        teacher /= refresh
        teacher += encoder(shape, everything, decoded=False) / HEAD_SHARE if head else 0.0
    student += head
    return {"teacher": teacher, "student": 3 * student, "total": teacher + 3 * student}


def traffic(shape: Shape, name: str) -> float:
    """Bytes of memory traffic per sample beside the matrix products, as `fasthpm.speed.traffic.step_bytes`."""
    method, everything, half = METHODS[name], shape.patches + shape.prefix, shape.patches // LOOKS
    decoders = 2 if method.predictor == "separate" else 1
    student = passes(shape, shape.seen, decoders * (shape.masked if method.cross else everything))
    query = shape.seen + shape.patches if method.difficulty == "masked_query" else everything
    answer = passes(shape, everything, shape.patches if method.cross else query)
    teacher = {
        "": 0.0,
        "paper": answer,
        "masked_query": answer,
        "in_place": passes(shape, everything, 0),
        "measured": LOOKS * passes(shape, shape.seen, half if method.cross else shape.seen + half),
    }[method.difficulty]
    if method.maps:
        head = method.difficulty == "in_place"
        teacher = teacher / FAST_REFRESH_EPOCHS + (passes(shape, everything, 0) / HEAD_SHARE if head else 0.0)
    return TRAFFIC * (3 * student + teacher)


def passes(shape: Shape, encoded: int, decoded: int) -> float:
    """Tokens times channels times blocks of a forward pass."""
    return encoded * shape.dim * shape.depth + decoded * shape.decoder_dim * shape.decoder_depth


def parameters(shape: Shape, name: str) -> tuple[float, float]:
    """(of the student, of what the teacher's forward reads)."""
    method = METHODS[name]
    embedding = shape.depth * 12 * shape.dim**2 + shape.values * shape.dim
    narrowed, one = shape.dim * shape.decoder_dim, shape.decoder_depth * 12 * shape.decoder_dim**2
    pixels = shape.decoder_dim * shape.values
    head = shape.dim**2 if method.difficulty == "in_place" else 0
    student = embedding + narrowed + one * (2 if method.predictor == "separate" else 1) + pixels + head
    asked = {"": 0, "in_place": embedding + head, "measured": embedding + narrowed + one + pixels}
    return student, asked.get(method.difficulty, embedding + narrowed + one)


def model(shape: Shape, method: str, tflops: float, bandwidth: float) -> dict[str, Any]:
    """Everything that is modelled of one method; seconds are per sample on one GPU."""
    flop, moved, rate, memory = work(shape, method)["total"], traffic(shape, method), tflops * 1e12, bandwidth * 1e12
    ideal = flop / rate
    realistic = ideal / REACHED + moved / memory / REACHED
    student, teacher = parameters(shape, method)
    step = realistic * shape.batch
    return {
        "gflop": flop / 1e9,
        "traffic_mb": moved / 1e6,
        "ideal_per_second": 1 / ideal,
        "realistic_per_second": 1 / realistic,
        "mfu": ideal / realistic,
        "epoch_seconds": {str(gpus): shape.samples * realistic / gpus for gpus in GPUS},
        "data_gb_per_second_per_gpu": shape.sample_bytes / realistic / 1e9,
        "cores_per_gpu": {name: 1 / realistic / speed for name, speed in DECODING.items()},
        "step_ms": 1e3 * step,
        "zero_ms": {name: 1e3 * 4 * student / link for name, link in LINKS.items()},
        "ema_ms": {name: 1e3 * 2 * teacher / link for name, link in LINKS.items()},
    }


def measured(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Steps by size, precision and machine. **Raises:** `UserError` for a file of another kind."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            result = json.loads(path.read_text())
            for precision, one in result["precisions"].items():
                size = ("video_" if result.get("frames", 1) > 1 else "") + result["size"]
                key = f"{size}, {precision}, {result['versions']['device']}"
                found[key] = {**one, "size": size, "batch_size": result["batch_size"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of bench.step ({error!r}); make it with bench.step -o") from error
    return found


def report(result: dict[str, Any]) -> str:
    """Markdown tables."""
    speed, scale = [], []
    for name, methods in result["shapes"].items():
        for method, one in methods.items():
            ratio = methods["mae"]["realistic_per_second"] / one["realistic_per_second"]
            flop_ratio = one["gflop"] / methods["mae"]["gflop"]
            speed.append(
                [
                    name,
                    method,
                    f"{one['gflop']:.0f}",
                    f"{one['traffic_mb']:.0f}",
                    f"{one['ideal_per_second']:,.0f}",
                    f"{one['realistic_per_second']:,.0f}",
                    f"{one['mfu']:.0%}",
                    f"{flop_ratio:.2f}",
                    f"{ratio:.2f}",
                ]
            )
            if method not in SCALED:
                continue
            epochs = " / ".join(f"{value:.1f}" for value in one["epoch_seconds"].values())
            cores = " / ".join(f"{value:.1f}" for value in one["cores_per_gpu"].values()) if "video" not in name else ""
            links = [" / ".join(f"{value:.1f}" for value in one[kind].values()) for kind in ("zero_ms", "ema_ms")]
            rate = f"{one['data_gb_per_second_per_gpu']:.2f}"
            scale.append([name, method, epochs, rate, cores, f"{one['step_ms']:.0f}", *links])
    lines = [
        table(("size", "method", "GFLOP", "MB", "ideal/s", "realistic/s", "MFU", "over MAE, FLOPs", "over MAE"), speed),
        "",
        table(
            (
                "size",
                "method",
                f"epoch s on {' / '.join(map(str, GPUS))} GPUs",
                "GB/s per GPU",
                f"cores per GPU ({' / '.join(DECODING)})",
                "step ms",
                f"ZeRO ms ({' / '.join(LINKS)})",
                "EMA ms",
            ),
            scale,
        ),
        "",
    ]
    for key, one in result["measured"].items():
        rate, rows = one["matmul_gflops_per_second"] * 1e9, []
        for method, seconds in one["median_seconds"].items():
            if method in METHODS and one["size"] in SHAPES:
                ideal = work(SHAPES[one["size"]], method)["total"] * one["batch_size"] / rate
                rows.append([method, f"{seconds:.3f}", f"{ideal:.3f}", f"{ideal / seconds:.0%}"])
        if rows:
            lines += [f"Measured, {key}:", "", table(("step", "measured s", "FLOPs at matmul rate s", "MFU"), rows), ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.roofline`."""
    parser = Parser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("--tflops", type=float, default=790.0, help="dense 16-bit matrix products, TFLOP/s")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="memory, TB/s")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="results of bench.step to put beside it")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the figures here as JSON")
    arguments: argparse.Namespace = parser.parse_args(argv)
    if arguments.tflops <= 0 or arguments.bandwidth <= 0:
        raise UserError("tflops and bandwidth must be more than 0")
    rates = (arguments.tflops, arguments.bandwidth)
    result = {
        "bench": "roofline",
        "tflops": rates[0],
        "bandwidth_tb": rates[1],
        "shapes": {
            name: {method: model(shape, method, *rates) for method in METHODS} for name, shape in SHAPES.items()
        },
        "measured": measured(arguments.results),
    }
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
