"""What a checkpoint costs: seconds that training waits, bytes, and the time from a restart to the first update.

    python -m bench.checkpoint [--size base] [--rounds 3] [--restart] [-o bench/results/checkpoint.json]

One rank saves an HPM run (float32 masters, both moments, EMA) the way training does. Synchronous: training waits until
the checkpoint is complete (copied, written, synced, hashed, renamed). Asynchronous: it waits for the copy, and the
updates made meanwhile are timed too. Restart: from the start of the process to the end of the first update, by a run of
its own that resumes from such a checkpoint.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common import files_in, json_file, machine, say, show, spread, table, work_folder, write_json
from fasthpm import checkpoint, pretrain, ranks, recipes
from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError
from fasthpm.recipe import Recipe, save_recipe
from fasthpm.run import state
from fasthpm.run.metrics import wait_for

SIZES = {"base": "vit_base_patch16_224", "large": "vit_large_patch16_224", "nano": "vit_nano_patch4_28"}


def bench_recipe(arguments: argparse.Namespace, output_dir: Path) -> Recipe:
    """HPM at the bench's size, on drawn images."""
    nano: dict[str, Any] = {"input_size": "28", "patch_size": 4, "decoder_dim": 64, "decoder_depth": 2}
    return dataclasses.replace(
        recipes.from_name("hpm_vit_base_in1k_200e"),
        model=f"hpm_{SIZES[arguments.size]}",
        batch_size=arguments.batch_size,
        global_batch_size=0,
        deepspeed_config=arguments.deepspeed_config,
        data_path="synthetic:64",
        output_dir=str(output_dir),
        epochs=1,
        warmup_epochs=0.0,
        panel_every=0,
        save_every=1,
        keep_checkpoints=1,
        num_workers=1,
        **(nano if arguments.size == "nano" else {}),
    )


def update(run: state.Run) -> float:
    """Seconds of one update."""
    wait_for(run.launch.device)
    begin = time.perf_counter()
    device = run.launch.device
    batch = next(run.batches)
    output = run.engine(
        batch.images,
        batch.ids,
        torch.full((), run.done, device=device),
        torch.full((), 0.25, dtype=torch.float64, device=device),
    )
    run.engine.backward(output.loss)
    run.engine.step()
    wait_for(device)
    run.done += 1
    return time.perf_counter() - begin


def save(run: state.Run, *, meanwhile: bool) -> dict[str, Any]:
    """One checkpoint: seconds until training may go on, until it is complete, and of the updates `meanwhile`."""
    begin = time.perf_counter()
    state.save(run)
    blocked = time.perf_counter() - begin
    updates = []
    while meanwhile and run.saver.busy:
        updates.append(update(run))
    state.finish_saving(run)
    complete = time.perf_counter() - begin
    return {"blocked": blocked if meanwhile else complete, "complete": complete, "updates": updates}


def measure(recipe: Recipe, launch: ranks.Launch, rounds: int) -> dict[str, Any]:
    """Rounds of a synchronous and an asynchronous save, with updates between them."""
    run = pretrain.build(recipe, launch)
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    calm, kinds = [update(run)], {"synchronous": False, "asynchronous": True}
    taken: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        calm.append(update(run))
        for kind, meanwhile in kinds.items():
            taken[kind].append(save(run, meanwhile=meanwhile))
            calm.append(update(run))
        say(f"round {number + 1}: {taken['synchronous'][-1]['complete']:.1f} s to write")
    newest = checkpoint.newest_valid(Path(recipe.output_dir), say)
    if newest is None:
        raise UserError(f"no checkpoint was written; is there room in {recipe.output_dir}?")
    run.loader.close()
    return {
        "parameters": run.num_parameters,
        "bytes": sum(path.stat().st_size for path in files_in(newest)),
        "rounds": taken,
        "update_seconds": spread(calm[1:]),
        **{
            kind: {part: spread([one[part] for one in taken[kind]]) for part in ("blocked", "complete")}
            for kind in kinds
        },
        "blocked_share": spread(
            [a["blocked"] / s["complete"] for a, s in zip(taken["asynchronous"], taken["synchronous"], strict=True)]
        ),
    }


def restart(recipe: Recipe, folder: Path) -> dict[str, float]:
    """Seconds from the start of a process to the end of its first update: a fresh run, and one that resumes."""
    save_recipe(recipe, folder / "start.json")
    seconds = {}
    for name, last in (("fresh", 1), ("resumed", 2)):
        begin = time.time()
        command = [
            sys.executable,
            "-m",
            "fasthpm.pretrain",
            "--recipe",
            str(folder / "start.json"),
            "--log_every",
            "1",
            "--stop_after",
            str(last),
            "--output_dir",
            str(folder / "run"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
        record = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        seconds[name] = record["time"] - begin
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.checkpoint`."""
    parser = Parser(prog="python -m bench.checkpoint", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="base")
    parser.add_argument("--batch_size", type=int, default=1, help="images per update")
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints of each kind")
    parser.add_argument("--restart", action="store_true", help="also time a restart")
    parser.add_argument("--deepspeed_config", default="zero1_bf16")
    parser.add_argument(
        "--work", type=Path, default=None, help="where checkpoints are written; base: 3 GB, large: 8 GB"
    )
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1 or arguments.rounds < 1:
        raise UserError("batch_size and rounds must be 1 or more")
    with work_folder(arguments.work) as work:
        recipe = bench_recipe(arguments, work / "saves")
        with ranks.session() as launch:
            result = {"bench": "checkpoint", "size": arguments.size, **measure(recipe, launch, arguments.rounds)}
        if arguments.restart:
            result["restart_seconds"] = restart(recipe, work)
    result["machine"] = machine()
    write_json(arguments.output, result)
    print(report(result))


def report(result: dict[str, Any]) -> str:
    """The figures as a table and lines."""
    rows = [
        [kind, show(result[kind]["blocked"]), show(result[kind]["complete"])]
        for kind in ("synchronous", "asynchronous")
    ]
    millions, gigabytes = result["parameters"] / 1e6, result["bytes"] / 2**30
    lines = [
        f"{result['size']}: {millions:.1f} M parameters, {gigabytes:.2f} GiB a checkpoint",
        table(("checkpoint", "training waits, s", "complete after, s"), rows),
        f"asynchronous waiting over the synchronous time: {show(result['blocked_share'], 3)}",
    ]
    if "restart_seconds" in result:
        seconds = result["restart_seconds"]
        lines.append(f"start to first update: fresh {seconds['fresh']:.1f} s, resumed {seconds['resumed']:.1f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
