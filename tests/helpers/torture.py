"""Torture: kill ranks, damage checkpoints, fill the disk, start again; at the end nothing may differ.

    python tests/helpers/torture.py --rounds 50 -o bench/results/torture.json

A report that is there already is added to, so that the rounds can be done in parts (`--rounds 10 --seed 1`, 2, …). The
disk is filled only if `--folder` is on a small file system of its own (mount -t tmpfs -o size=256m tmpfs FOLDER).

One run is left alone. Another, of the same recipe, is disturbed `--rounds` times at random moments and started again
with the same command each time. Masters, moments and EMA of both must then agree bit for bit. The test suite does a few
rounds (`tests/checkpoint/test_torture.py`).

With `--elastic` every start takes another number of ranks, ZeRO stage or accumulation, in float32. Every update must
then see the very samples of the undisturbed run, pixel for pixel, however often it is done; sums are rounded in another
order, so the weights must agree within `ELASTIC_BOUND` only.

    python tests/helpers/torture.py --elastic --rounds 6 --updates 160 -o bench/results/torture_elastic.json
"""

import argparse
import collections
import itertools
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasthpm.checkpoint.folder import newest_valid
from fasthpm.checkpoint.shards import STATES, SavedState
from fasthpm.ranks.zero import State
from fasthpm.run.versions import versions
from tests.helpers.launch import ranks_of, running_ranks

MODULE = "fasthpm.pretrain"
RECORDER = Path(__file__).with_name("recorded.py")
GLOBAL_BATCH = 16
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


ELASTIC_BOUND = 1e-4  # |difference| / |weights|, of masters and of the EMA


@dataclass(frozen=True)
class Shape:
    """How the ranks of one start share the same global batch of 16."""

    ranks: int = 2
    batch_size: int = 8
    stage: int = 0  # of ZeRO in float32; 0 = the recipe's own configuration

    def next(self, chance: random.Random) -> "Shape":
        """Another one."""
        all_of_them = [Shape(*values) for values in itertools.product((1, 2), (4, 8), (1, 2, 3))]
        return chance.choice([shape for shape in all_of_them if shape != self])


@dataclass(frozen=True)
class Torture:
    """What all starts of a torture share."""

    folder: Path
    updates: int
    launcher: str = "torchrun"
    elastic: bool = False
    longest_wait: float = 4.0  # seconds between a round's first save and its deed
    model: str = "hpm_vit_nano_patch4_28"

    def start(self, name: str, shape: Shape) -> Any:
        """Start the run `name`, or start it again."""
        if self.elastic:
            notes = self.folder / f"{name}-samples"
            notes.mkdir(exist_ok=True)
            program, words = RECORDER, [str(notes), *command(self.folder / name, self.updates, self.model)]
            words += ["--deepspeed_config", str(self._configuration(shape)), "--batch_size", str(shape.batch_size)]
            words += ["--global_batch_size", "16", "--lr", "1e-4"]
            return running_ranks(program, *words, ranks=shape.ranks, launcher=self.launcher)
        return running_ranks(MODULE, *command(self.folder / name, self.updates, self.model), launcher=self.launcher)

    def _configuration(self, shape: Shape) -> Path:
        path = self.folder / f"zero{shape.stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": shape.stage}}))
        return path


def command(output_dir: Path, updates: int, model: str) -> list[str]:
    """The run, the same every time."""
    return [
        "--recipe",
        "debug",
        "--model",
        model,
        "--data_path",
        "synthetic:128",
        "--batch_size",
        "8",
        "--log_every",
        "1000000",
        "--panel_every",
        "0",
        "--difficulty_every",
        "0",
        "--epochs",
        str(updates // SAVE_EVERY),
        "--warmup_epochs",
        "0",
        "--save_every",
        "1",
        "--keep_checkpoints",
        "3",
        "--output_dir",
        str(output_dir),
    ]


def run_to_end(plan: Torture, name: str, shape: Shape) -> str:
    """Start the run and let it finish; its output."""
    with plan.start(name, shape) as process:
        output, _ = process.communicate(timeout=1800)
    if process.returncode:
        raise RuntimeError(f"a run that nobody disturbed failed:\n{output}")
    return output


def disturb(plan: Torture, deed: str, shape: Shape, chance: random.Random) -> dict[str, Any]:
    """Start the run, wait a random while after its start, do `deed`, and see how it ended."""
    output_dir = plan.folder / "disturbed"
    before = newest(output_dir)
    with plan.start("disturbed", shape) as process:
        wait_for_progress(process, output_dir, before, chance.uniform(0, plan.longest_wait))
        filler = fill(output_dir) if deed == "fill the disk" else None
        if filler:
            time.sleep(chance.uniform(0.2, 1.5))
        if deed == "kill while saving":
            wait_for_save(process, output_dir)
        killed = kill(process, chance, everyone=deed == "kill all ranks")
        output, _ = process.communicate(timeout=300)
    if filler:
        filler.unlink()
    elif deed == "fill the disk":
        deed = "kill one rank"  # the disk is not ours to fill
    damaged = damage(output_dir, deed, chance)
    resumed = re.search(r"resuming from \S+ at update (\d+)", output)
    return {
        "deed": deed,
        "killed": killed,
        "damaged": damaged,
        "status": process.returncode,
        "resumed_at": int(resumed[1]) if resumed else 0,
        "left_at": newest(output_dir),
        **({"shape": vars(shape)} if plan.elastic else {}),
    }


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
    ranks = ranks_of(process.pid, "--recipe") if process.poll() is None else []
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
    ours, theirs = final_states(a, b)
    return sum(
        int((ours.whole(state, name) != theirs.whole(state, name)).sum()) for state in STATES for name in ours.names
    )


def final_states(a: Path, b: Path) -> list[SavedState]:
    """Of two finished runs of the same model and length."""
    states = [SavedState(newest_valid(folder, print) or folder) for folder in (a, b)]
    if states[0].names != states[1].names or states[0].optimizer_step != states[1].optimizer_step:
        raise RuntimeError("the runs are not of the same model and length")
    return states


def relative_difference(a: Path, b: Path) -> float:
    """|difference| / |weights| of two finished runs: the larger one of masters and EMA."""
    ours, theirs = final_states(a, b)
    kinds: tuple[State, ...] = ("master", "ema")
    squares = [
        [
            (
                float((ours.whole(kind, name).double() - theirs.whole(kind, name).double()).square().sum()),
                float(ours.whole(kind, name).double().square().sum()),
            )
            for name in ours.names
        ]
        for kind in kinds
    ]
    return max(math.sqrt(sum(d for d, _ in kind) / sum(w for _, w in kind)) for kind in squares)


def samples(notes: Path) -> dict[int, list[Any]]:
    """{update: the sorted [id, checksum of its pixels] of its samples}, as the ranks of a run noted them.

    **Raises:** `RuntimeError` if an update that was done again did not see the samples that it saw before.
    """
    seen: dict[int, set[tuple[int, int]]] = collections.defaultdict(set)
    for path in notes.iterdir():
        for line in path.read_text().splitlines():
            update, ids, checksums = json.loads(line)
            seen[update] |= set(zip(ids, checksums, strict=True))
    for update, pairs in seen.items():
        if len(pairs) > GLOBAL_BATCH:
            raise RuntimeError(f"update {update} saw other samples when it was done again")
    return {update: sorted(pairs) for update, pairs in sorted(seen.items())}


def torture(plan: Torture, rounds: int, seed: int) -> dict[str, Any]:
    """Both runs; the report."""
    chance = random.Random(seed)
    shape = Shape(stage=1) if plan.elastic else Shape()
    run_to_end(plan, "calm", shape)
    calm, disturbed, history = plan.folder / "calm", plan.folder / "disturbed", []
    for number in range(rounds):
        deed = DEEDS[number % len(DEEDS)] if rounds < 2 * len(DEEDS) else chance.choice(DEEDS)
        history.append(disturb(plan, deed, shape, chance))
        print(json.dumps(history[-1]), file=sys.stderr, flush=True)
        shape = shape.next(chance) if plan.elastic else shape
        if history[-1]["left_at"] >= plan.updates:
            break
    output = run_to_end(plan, "disturbed", shape)
    lost = [b["resumed_at"] - a["left_at"] for a, b in itertools.pairwise(history)]
    report = {
        "rounds": len(history),
        "survived": len(history),
        "updates": plan.updates,
        "save_every_updates": SAVE_EVERY,
        "most_updates_repeated": max([-x for x in lost] + [0]),
        "finished": f"finished {plan.updates} of {plan.updates} updates" in output,
        "history": history,
    }
    return report | (compare_elastic(plan) if plan.elastic else {"differences": differences(calm, disturbed)})


def compare_elastic(plan: Torture) -> dict[str, Any]:
    """Which updates saw other samples, and whether the weights differ by more than rounding."""
    calm, disturbed = (samples(plan.folder / f"{name}-samples") for name in ("calm", "disturbed"))
    apart = relative_difference(plan.folder / "calm", plan.folder / "disturbed")
    other = sum(calm.get(update) != disturbed.get(update) for update in range(plan.updates))
    return {
        "updates_of_other_samples": other,
        "relative_difference": apart,
        "bound": ELASTIC_BOUND,
        "differences": other + (apart > ELASTIC_BOUND),
    }


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
    parser.add_argument("--launcher", default="torchrun", choices=("torchrun", "forked"), help="see launch.py")
    parser.add_argument("--elastic", action="store_true", help="start with other ranks, stages and micro-batches")
    parser.add_argument("-o", "--output", type=Path, help="JSON report")
    arguments = parser.parse_args()
    begin = time.time()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        plan = Torture(Path(folder), arguments.updates, arguments.launcher, arguments.elastic)
        report = torture(plan, arguments.rounds, arguments.seed)
    report |= {"seconds": round(time.time() - begin), "seed": arguments.seed}
    report |= {"versions": versions(torch.device("cpu"), 2)}
    if arguments.output:
        report = add_to(arguments.output, report)
    print({key: report[key] for key in ("rounds", "differences", "finished", "seconds", "most_updates_repeated")})
    sys.exit(bool(report["differences"]) or not report["finished"])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
