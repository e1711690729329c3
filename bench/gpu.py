"""Everything worth knowing on one GPU, in one process and eight minutes.

    bash bench/gpu.sh OUT               # finds Python, unpacks what is missing (bench/gpu_pack.sh), starts this, packs
    python -m bench.gpu OUT [--seconds 480] [--parts correctness steps …]
    python -m bench.gpu OUT --rehearse  # the same with the smallest sizes, on a CPU too
    python -m bench.gpu OUT --table     # only the tables of what is there

OUT/results.json is written before and after each part, OUT/results.md beside it. A part that fails is kept with its
error, and the next one goes on; one that takes longer than its time is cut off. The same command goes on where it, or
its process, stopped: parts that have a result or an error are not run again.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bench import gpu_parts
from bench.common import say, table, write_json
from bench.gpu_parts import AbsentError, Found, Settings
from fasthpm import files, ranks
from fasthpm.cli import Parser, run_command, without_effect
from fasthpm.errors import UserError

EXIT_AGAIN = 75  # the process had to end in a part: start it again for the rest
RESULTS, PAGE = "results.json", "results.md"
LEAST = 8.0  # seconds that must be left for a part to begin
GRACE = 20.0  # seconds that a part may hang in native code after its time


class OverdueError(BaseException):
    """A part has had its time. No `Exception`: nothing on the way may take it for a failure of its own."""


@dataclass(frozen=True)
class Part:
    """One measurement and the seconds that it may take."""

    seconds: float
    run: Callable[[Settings, Found], None]

    @property
    def title(self) -> str:
        """What it is, in a line."""
        return (self.run.__doc__ or "").partition("\n")[0].rstrip(".")


PARTS = {
    "machine": Part(20, gpu_parts.machine),
    "correctness": Part(60, gpu_parts.correctness),
    "steps": Part(100, gpu_parts.steps),
    "profile": Part(30, gpu_parts.profile),
    "attention": Part(30, gpu_parts.attention),
    "timers": Part(30, gpu_parts.timers),
    "graph": Part(60, gpu_parts.graph),
    "sweep": Part(60, gpu_parts.sweep),
    "compiled": Part(120, gpu_parts.compiled),
    "video": Part(60, gpu_parts.video),
    "large": Part(60, gpu_parts.large),
}


# ------------------------------------------------------------------------------------------------------ running
def run_parts(out: Path, names: Sequence[str], settings: Settings, end: float) -> dict[str, Any]:
    """Run the parts that have no result yet, until `end` (seconds since 1970); all results."""
    found = read(out)
    for name in names:
        known = found["parts"].get(name, {}).get("state")
        if known == "running":
            found["parts"][name] = {"state": "failed", "error": "the process ended in it"}
        if known in ("done", "failed", "running", "absent"):
            continue
        left = end - time.time()
        if left < LEAST:
            found["parts"][name] = {"state": "left out", "error": f"{max(left, 0):.0f} s were left"}
            continue
        found["parts"][name] = {"state": "running"}
        write(out, found)
        say(f"== {name} ({left:.0f} s left)")
        found["parts"][name] = attempt(PARTS[name], settings, min(PARTS[name].seconds, left))
        say(f"   {found['parts'][name]['state']} {found['parts'][name].get('error', '')}")
        write(out, found)
        gpu_parts.release(settings.device)
    write(out, found)
    return found


def attempt(part: Part, settings: Settings, seconds: float) -> dict[str, Any]:
    """What a part has come to: what it found, its error if it has one, and the seconds that it took."""
    begin, result = time.perf_counter(), Found()
    made: dict[str, Any] = {"state": "done"}
    try:
        with limited(seconds):
            part.run(settings, result)
    except AbsentError as error:
        made = {"state": "absent", "error": str(error)}
    except OverdueError:
        made = {"state": "failed", "error": f"not done in {seconds:.0f} s"}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        trace = traceback.format_exc().strip().splitlines()[-12:]
        made = {"state": "failed", "error": f"{type(error).__name__}: {lines[0][:200]}", "trace": trace}
    return {**made, "seconds": time.perf_counter() - begin, "result": result}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Cut the block off after so many seconds; where native code does not let it be, end the process."""

    def overdue(number: int, frame: FrameType | None) -> None:
        raise OverdueError

    before = signal.signal(signal.SIGALRM, overdue)
    hard = threading.Timer(seconds + GRACE, os._exit, (EXIT_AGAIN,))
    hard.daemon = True
    hard.start()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        hard.cancel()


# ------------------------------------------------------------------------------------------------------ files
def read(out: Path) -> dict[str, Any]:
    """What is in OUT, or nothing."""
    path = out / RESULTS
    return json.loads(path.read_text()) if path.exists() else {"bench": "gpu", "parts": {}}


def write(out: Path, found: dict[str, Any]) -> None:
    """Write results and their tables."""
    write_json(out / RESULTS, found)
    files.write_text(out / PAGE, page(found))


# ------------------------------------------------------------------------------------------------------ tables
def page(found: dict[str, Any]) -> str:
    """Markdown: what was done, then a table of each part."""
    parts = found["parts"]
    rows = [
        [name, part["state"], f"{part.get('seconds', 0):.0f}", part.get("error", ""), PARTS[name].title]
        for name, part in parts.items()
    ]
    lines = ["# One GPU", "", table(("part", "state", "s", "error", "what"), rows), ""]
    for name, part in parts.items():
        if part.get("result"):
            try:
                text = TABLES.get(name, of_steps)(part["result"])
            except (KeyError, TypeError) as error:  # a part that failed has not found all of it
                text = f"no table: {error!r} is missing"
            lines += [f"## {name}: {PARTS[name].title}", "", text, ""]
    return "\n".join(lines)


def of_machine(found: dict[str, Any]) -> str:
    """Machine and rates."""
    told = found["versions"]
    rates = ", ".join(f"{size}: {rate:.0f}" for size, rate in found["matmul_tflops"].items())
    if "packed" in found:
        told = {**told, "commit": found["packed"]}
    names = ("device", "torch", "deepspeed", "python", "commit")
    return (
        f"{', '.join(f'{name} {told[name]}' for name in names)}; {found['memory_gib']:.1f} GiB; TFLOP/s of bf16 "
        f"products by size {rates}; {found['copy_tb_per_second']:.2f} TB/s of copies"
    )


def of_checks(found: dict[str, Any]) -> str:
    """Errors beside their bounds."""
    rows = [
        [c["what"], f"{c['error']:.2g}", f"{c['bound']:.2g}", "" if c["good"] else "WRONG"] for c in found["checks"]
    ]
    return table(("what", "relative error", "bound", ""), rows)


def of_steps(found: dict[str, Any]) -> str:
    """Times, then ratios, of one run of `bench.step` or of several by name."""
    runs = found if "median_seconds" not in found else {str(found["batch_size"]): found}
    rows, over, kernels = [], [], set[str]()
    for name, run in runs.items():
        if "error" in run:
            rows.append([name, "", run["error"], "", "", "", ""])
            continue
        for variant, seconds in run["median_seconds"].items():
            host = sorted(run["cpu_seconds"][variant])[len(run["cpu_seconds"][variant]) // 2]
            rate = run["images_per_second"][variant]
            cells = (f"{seconds * 1e3:.2f}", f"{host * 1e3:.2f}", f"{rate:,.0f}", f"{run['mfu'][variant]:.0%}")
            rows.append([name, variant, *cells, f"{run['memory_gib']:.1f}"])
        for variant, chosen in run.get("attention", {}).items():
            kernels.add(f"{variant}: {', '.join(sorted(set(chosen.values())))}")
        over += [[name, ratio, f"{value['median']:.3f}"] for ratio, value in run["ratios"].items()]
    header = ("run", "step", "ms", "ms of processors", "samples/s", "MFU", "GiB, peak of all")
    text = table(header, rows)
    if "without_baselines" in found:
        text += f"\n\nThe baselines could not be timed: {found['without_baselines']}"
    text += f"\n\n{table(('run', 'ratio of time', 'median'), over)}" if over else ""
    return text + (f"\n\nKernels of attention: {'; '.join(sorted(kernels))}." if kernels else "")


def of_profile(found: dict[str, Any]) -> str:
    """Kernels by time."""
    busy = f"{found['kernel_ms']:.2f} of {found['wall_ms']:.2f} ms in {found['kernels']:.0f} kernels per update"
    rows = [[f"`{row['kernel']}`", f"{row['calls']:.0f}", f"{row['ms']:.3f}"] for row in found["rows"]]
    return f"{busy}\n\n{table(('kernel', 'calls', 'ms'), rows)}"


def of_attention(found: dict[str, Any]) -> str:
    """Backends beside each other."""
    kinds = list(next(iter(found["ms"].values())))
    rows = [
        [name, *(f"{one[k]:.3f}" if isinstance(one[k], float) else "none" for k in kinds)]
        for name, one in found["ms"].items()
    ]
    return table(("ms", *kinds), rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "machine": of_machine,
    "correctness": of_checks,
    "profile": of_profile,
    "attention": of_attention,
}


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.gpu`."""
    parser = Parser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="which, in this order")
    parser.add_argument("--rehearse", action="store_true", help="the smallest sizes, with or without a GPU")
    parser.add_argument("--table", action="store_true", help="run nothing: print the tables of what is there")
    arguments = parser.parse_args(argv)
    if arguments.table:
        # --seconds is from gpu.sh, whatever else is given
        without_effect(["parts", "rehearse"], "--table runs nothing")
        if not read(arguments.out)["parts"]:
            raise UserError(f"{arguments.out} holds no {RESULTS}; give a folder that bench/gpu.sh has written")
        print(page(read(arguments.out)))
        return
    end = time.time() + arguments.seconds
    with ranks.session() as launch:
        if launch.device.type != "cuda" and not arguments.rehearse:
            raise UserError("torch sees no GPU here; add --rehearse for the smallest sizes on a CPU")
        settings = gpu_parts.rehearsal(launch) if arguments.rehearse else Settings(launch)
        found = run_parts(arguments.out, arguments.parts, settings, end)
    print(page(found))
    bad = [name for name, part in found["parts"].items() if part["state"] == "failed"]
    checks = found["parts"].get("correctness", {}).get("result", {}).get("checks", ())
    if wrong := [one["what"] for one in checks if not one["good"]]:
        bad.append(f"correctness ({len(wrong)} wrong)")
    if bad:
        say(f"failed: {', '.join(bad)}; see {arguments.out / RESULTS}")
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
