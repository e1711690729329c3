"""What the data benches share: processor time, spread, ratios within rounds, prepared sets, tables, the JSON."""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from fasthpm import files
from fasthpm.cli import Parser
from fasthpm.data.ffcv.beton import read_sidecar
from fasthpm.data.pixels import list_images
from fasthpm.errors import UserError
from fasthpm.files import check_place
from fasthpm.machine import count_cores
from fasthpm.probes.finetune.settings import has_bf16
from fasthpm.run.versions import versions

QUALITY = 90
SETS = {  # how each prepared set is stored
    "500-reencoded": ("--max_resolution", "500"),  # the default, and as FFCV's writer does it
    "500-kept": ("--max_resolution", "500", "--keep_jpeg"),
    "400": ("--max_resolution", "400"),
    "256": ("--max_resolution", "256"),
    "raw256": ("--max_resolution", "256", "--write_mode", "raw"),
}


# -------------------------------------------------------------------------------------------------------- figures
def cpu_seconds() -> float:
    """Processor time of this process and of its children, whether they live or have been waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Spread of value / baseline, round by round."""
    return spread([value / base for value, base in zip(values, baseline, strict=True)])


def show(figure: dict[str, float], digits: int = 2) -> str:
    """`median (low to high)`."""
    median, low, high = (f"{figure[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fast_config() -> str:
    """The preset to train by here: bfloat16, or float32 where it would be emulated."""
    return "zero1_bf16" if has_bf16() else "zero1_fp32"


def machine() -> dict[str, Any]:
    """What the figures were taken on, and how busy it was."""
    return {
        **versions(torch.device("cpu"), 1),
        "cores": count_cores(),
        "ram_gib": psutil.virtual_memory().total / 2**30,
        "load_average": os.getloadavg()[0],
    }


@contextmanager
def work_folder(chosen: Path | None) -> Iterator[Path]:
    """`chosen`, made if need be, or a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="fasthpm-bench-") as temporary:
        work = chosen or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        yield work


def json_file(text: str) -> Path:
    """The type of --output: where figures and, of some benches, a .md beside them go once all is measured.

    **Raises:** `UserError` for a name that is no .json, or cannot be written.
    """
    check_place(Path(text), "--output", endings=(".json",))
    check_place(Path(text).with_suffix(".md"), "--output's Markdown")
    return Path(text)


def parse_quickly(parser: Parser, argv: Sequence[str] | None, **quick: Any) -> argparse.Namespace:
    """The command line; with --quick, `quick` takes the place of the defaults, and what is given there still counts."""
    arguments = parser.parse_args(argv)
    if arguments.quick:
        parser.set_defaults(**quick)
        arguments = parser.parse_args(argv)
    return arguments


def add_device_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """`--device`, `--threads`, `--rounds` and `--output` of a bench of tensor code."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What short training runs are made of."""
    parser.add_argument("--recipe", default="hpm_vit_base_in1k_200e")
    parser.add_argument("--data_path", default="synthetic:1024", help="as in fasthpm pretrain")
    parser.add_argument("--batch_size", type=int, default=64, help="samples per rank and micro-step")
    parser.add_argument("--num_workers", type=int, default=0, help="decoding threads per rank (0: all cores)")
    parser.add_argument("--deepspeed_config", default="zero1_bf16")
    parser.add_argument("--updates", type=int, default=40, help="per run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--extra", default="", help="further flags of fasthpm pretrain, in one string")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")


def use_device(arguments: argparse.Namespace) -> torch.device:
    """The device that was asked for, torch's threads set. **Raises:** `UserError` for impossible values."""
    if arguments.rounds < 1 or arguments.threads < 1:
        raise UserError("rounds and threads must be 1 or more")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU; use --device cpu")
    torch.set_num_threads(arguments.threads)
    return torch.device(arguments.device)


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write `result` if a path is given."""
    if path:
        with files.writing(path, "make room, or choose another --output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, result)


def say(line: str) -> None:
    """Progress, on stderr: stdout is for the tables."""
    print(line, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------- data
def choose_photos(photos: Path, work: Path, count: int) -> Path:
    """A folder of links to `count` evenly spaced files of `photos` (0 = all), one subfolder per class.

    **Raises:** `UserError` if there are fewer, or no class folders.
    """
    found = list_images(photos)
    count = count or len(found.paths)
    if len(found.paths) < count or len(found.classes) < 2:
        raise UserError(
            f"{photos} has {len(found.paths)} images in {len(found.classes)} classes, expected {count} or more in 2 "
            f"or more; make them with python -m bench.photos {photos}"
        )
    folder = work / f"photos-{count}"
    for chosen in range(count):
        index = chosen * len(found.paths) // count
        link = folder / found.classes[found.labels[index]] / f"{chosen:06d}{Path(found.paths[index]).suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(Path(found.paths[index]).resolve())
    return folder


def files_in(folder: Path) -> list[Path]:
    """All files below `folder`."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def prepare_command(source: Path, out: Path, name: str, workers: int) -> list[str]:
    """The command line that prepares `source` as the set `name`."""
    command = [sys.executable, "-m", "data_prep.images", str(source), str(out), *SETS[name], "--overwrite"]
    quality = [] if "raw" in SETS[name] else ["--jpeg_quality", str(QUALITY)]
    return [*command, *quality, "--num_workers", str(workers)]


def prepared(source: Path, work: Path, name: str, workers: int) -> Path:
    """The set `name` of `source`, prepared unless it is there already."""
    out = work / f"{source.name}-{name}.beton"
    if not out.exists():
        say(f"preparing {out}")
        run(prepare_command(source, out, name, workers))
    read_sidecar(out)
    return out


def run(command: Sequence[str]) -> None:
    """Run a command quietly. **Raises:** `UserError` with the end of what it printed, if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no output"]
        last = next((line for line in lines if "fasthpm: error" in line), lines[-1])  # launchers say more after it
        raise UserError(f"{' '.join(command)} failed with status {done.returncode}: {last}")
