"""Torture: kill ranks, damage checkpoints, fill the disk, start again; at the end nothing may differ.

    python tests/torture.py --rounds 50 -o bench/results/torture.json

A report that is there already is added to, so that the rounds can be done in parts (`--rounds 10 --seed 1`, 2, …). The
disk is filled only if `--folder` is on a small file system of its own (mount -t tmpfs -o size=256m tmpfs FOLDER).

One run is left alone. Another, of the same recipe, is disturbed `--rounds` times at random moments and started again
with the same command each time. Masters, moments and EMA of both must then agree bit for bit. The test suite does a few
rounds (`tests/test_torture.py`).
"""

import argparse
import collections
import itertools
import json
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from launch import ranks_of, running_ranks

from fasthpm.checkpoint import newest_valid
from fasthpm.shards import STATES, SavedState
from fasthpm.versions import versions

MODULE = "fasthpm.pretrain"
SAVE_EVERY = 8  # updates: an epoch of synthetic:128 in global batches of 16
DEEDS = (
    "kill one rank",
    "kill all ranks",
    "kill while saving",
    "flip a byte",
    "truncate a file",
    "delete a file",
    "fill the disk",
)


def command(output_dir: Path, updates: int) -> list[str]:
    """The run, the same every time."""
    return ["--recipe", "debug", "--data_path", "synthetic:128", "--batch_size", "8", "--log_every", "1000000",
            "--panel_every", "0", "--epochs", str(updates // SAVE_EVERY), "--warmup_epochs", "0", "--save_every", "1",
            "--keep_checkpoints", "3", "--output_dir", str(output_dir)]  # fmt: skip


def run_to_end(output_dir: Path, updates: int) -> str:
    """Start the run and let it finish; its output."""
    with running_ranks(MODULE, *command(output_dir, updates)) as process:
        output, _ = process.communicate(timeout=1800)
    if process.returncode:
        raise RuntimeError(f"a run that nobody disturbed failed:\n{output}")
    return output


def disturb(output_dir: Path, updates: int, deed: str, chance: random.Random) -> dict[str, Any]:
    """Start the run, wait a random while after its start, do `deed`, and see how it ended."""
    before = newest(output_dir)
    with running_ranks(MODULE, *command(output_dir, updates)) as process:
        wait_for_progress(process, output_dir, before, chance.uniform(0, 4))
        filler = fill(output_dir) if deed == "fill the disk" else None
        if filler:
            time.sleep(chance.uniform(0.2, 1.5))
        if deed == "kill while saving":
            wait_for_save(process, output_dir)
        killed = kill(process, chance, everyone=deed == "kill all ranks")
        output, _ = process.communicate(timeout=300)
    if filler:
        filler.unlink()
    damaged = damage(output_dir, deed, chance)
    resumed = re.search(r"resuming from \S+ at update (\d+)", output)
    return {"deed": deed, "killed": killed, "damaged": damaged, "status": process.returncode,
            "resumed_at": int(resumed[1]) if resumed else 0, "left_at": newest(output_dir)}  # fmt: skip


def newest(output_dir: Path) -> int:
    """Update of the newest checkpoint folder, sound or not; 0 if there is none."""
    return max((int(path.name[5:]) for path in output_dir.glob("checkpoints/step-*")), default=0)


def wait_for_progress(process: Any, output_dir: Path, before: int, seconds: float) -> None:
    """Until the run has saved once more (so that every round gets on), and then `seconds`."""
    deadline = time.monotonic() + 120
    while newest(output_dir) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)


def wait_for_save(process: Any, output_dir: Path) -> None:
    while process.poll() is None and not list(output_dir.glob("checkpoints/.writing-*/shards")):
        time.sleep(0.001)


def kill(process: Any, chance: random.Random, *, everyone: bool) -> list[int]:
    """SIGKILL a random rank, or all of them; which."""
    ranks = ranks_of(process.pid, MODULE) if process.poll() is None else []
    chosen = list(range(len(ranks))) if everyone else chance.sample(range(len(ranks)), min(1, len(ranks)))
    for rank in chosen:
        ranks[rank].kill()
    return chosen


def fill(output_dir: Path) -> Path | None:
    """Fill the file system, if it is a small one of its own; the file that does it."""
    if shutil.disk_usage(output_dir).total > 1 << 30:
        return None
    filler = output_dir.parent / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    except OSError:
        return filler


def damage(output_dir: Path, deed: str, chance: random.Random) -> str:
    """Spoil a random file of the newest checkpoint, if an older sound one remains; its name."""
    folders = sorted(output_dir.glob("checkpoints/step-*"))
    if deed not in ("flip a byte", "truncate a file", "delete a file") or len(folders) < 2:
        return ""
    path = chance.choice(sorted(p for p in folders[-1].rglob("*") if p.is_file() and p.stat().st_size))
    data = bytearray(path.read_bytes())
    if deed == "delete a file":
        path.unlink()
    elif deed == "truncate a file":
        path.write_bytes(data[: chance.randrange(len(data))])
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    return str(path.relative_to(folders[-1]))


def differences(a: Path, b: Path) -> int:
    """Elements in which two finished runs differ."""
    states = [SavedState(newest_valid(folder, print) or folder) for folder in (a, b)]
    if states[0].names != states[1].names or states[0].optimizer_step != states[1].optimizer_step:
        raise RuntimeError("the runs are not of the same model and length")
    return sum(
        int((states[0].whole(state, name) != states[1].whole(state, name)).sum())
        for state in STATES
        for name in states[0].names
    )


def torture(folder: Path, rounds: int, seed: int, updates: int) -> dict[str, Any]:
    """Both runs; the report."""
    chance = random.Random(seed)
    run_to_end(folder / "calm", updates)
    history = []
    for number in range(rounds):
        deed = DEEDS[number % len(DEEDS)] if rounds < 2 * len(DEEDS) else chance.choice(DEEDS)
        history.append(disturb(folder / "disturbed", updates, deed, chance))
        print(json.dumps(history[-1]), file=sys.stderr, flush=True)
        if history[-1]["left_at"] >= updates:
            break
    output = run_to_end(folder / "disturbed", updates)
    lost = [b["resumed_at"] - a["left_at"] for a, b in itertools.pairwise(history)]
    return {
        "rounds": len(history), "survived": len(history), "updates": updates, "save_every_updates": SAVE_EVERY,
        "most_updates_repeated": max([-x for x in lost] + [0]), "differences": differences(
            folder / "calm", folder / "disturbed"), "finished": f"finished {updates} of {updates} updates" in output,
        "history": history,
    }  # fmt: skip


SUMS = ("rounds", "survived", "updates", "differences", "seconds")


def add_to(path: Path, part: dict[str, Any]) -> dict[str, Any]:
    """Add a part to the report at `path`; the whole."""
    parts = [*(json.loads(path.read_text())["parts"] if path.is_file() else []), part]
    total: dict[str, Any] = {name: sum(one[name] for one in parts) for name in SUMS}
    total |= {
        "finished": all(one["finished"] for one in parts),
        "most_updates_repeated": max(one["most_updates_repeated"] for one in parts),
        "save_every_updates": SAVE_EVERY,
        "deeds": dict(collections.Counter(entry["deed"] for one in parts for entry in one["history"])),
        "parts": parts,
    }
    path.write_text(json.dumps(total, indent=1) + "\n")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="disturbances")
    parser.add_argument("--updates", type=int, default=8000, help="length of both runs, a multiple of 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs live; a file system under 1 GiB is also filled")
    parser.add_argument("-o", "--output", type=Path, help="JSON report")
    arguments = parser.parse_args()
    begin = time.time()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = torture(Path(folder), arguments.rounds, arguments.seed, arguments.updates)
    report |= {"seconds": round(time.time() - begin), "seed": arguments.seed}
    report |= {"versions": versions(torch.device("cpu"), 2)}
    if arguments.output:
        report = add_to(arguments.output, report)
    print({key: report[key] for key in ("rounds", "differences", "finished", "seconds", "most_updates_repeated")})
    sys.exit(bool(report["differences"]) or not report["finished"])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
