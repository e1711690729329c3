"""The command of a dense task: its flags, training or evaluating, and what is written at the end."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from fasthpm import files, ranks
from fasthpm.cli import Arguments, Parser
from fasthpm.dense import tuning
from fasthpm.dense.evaluating import AUTO, chosen, evaluate_foreign, evaluate_only
from fasthpm.dense.results import NETWORK_FILE, DenseResult, report
from fasthpm.dense.task import Task
from fasthpm.dense.tuning import DenseTuning
from fasthpm.errors import UserError, nearest
from fasthpm.options import add_recipe_arguments
from fasthpm.ranks import zero
from fasthpm.run.lock import FolderLock
from fasthpm.run.records import METRICS_FILE, read_metrics
from fasthpm.tuning.loop import carry_out


# -------------------------------------------------------------------------------------------------- command
def main(task: Task, argv: Arguments = None) -> DenseResult:
    """`fasthpm segment`, `fasthpm detect` and their functions, once per rank."""
    arguments, given = parse_arguments(task, argv)
    with ranks.session() as launch:
        if arguments.run.is_file():
            if not given.get("evaluate"):
                raise UserError(f"{arguments.run} is a file; give a run, or --evaluate to test the network in it")
            return evaluate_foreign(task, arguments, given, launch)
        if given.get("evaluate"):
            return evaluate_only(task, arguments, given, launch)
        with ranks.in_agreement():
            settings = chosen(task, arguments, given, launch.world_size)
        with FolderLock(launch.rank) as lock:
            return train(tuning.build(task, arguments.run, settings, launch, lock))


def parse_arguments(task: Task, argv: Arguments) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(run, recipe), and the settings that were given."""
    parser = Parser(prog=f"fasthpm {task.name}", description=task.summary)
    parser.add_argument(
        "run",
        type=Path,
        help="output_dir of a pretraining run or an import, or one of its checkpoints; with --evaluate also the file "
        "of a network that others fine-tuned",
    )
    names = ", ".join(task.recipes)
    parser.add_argument("--recipe", default=AUTO, help=f"a set of numbers: {names}; auto (the default): what fits")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add_recipe_arguments(parser, task.settings)
    arguments = parser.parse_args(argv)
    if arguments.recipe != AUTO and arguments.recipe not in task.recipes:
        known = (AUTO, *task.recipes)
        raise UserError(
            f"unknown recipe {arguments.recipe!r}{nearest(arguments.recipe, known)}; expected one of {', '.join(known)}"
        )
    known_fields = {field.name for field in dataclasses.fields(task.settings)}
    given = {name: value for name, value in vars(arguments).items() if name in known_fields}
    task.refuse_idle(given)
    return arguments, given


# -------------------------------------------------------------------------------------------------- training
def train(run: DenseTuning) -> DenseResult:
    """Train and test what was built. **Raises:** `KeyboardInterrupt` if Ctrl-C ended it."""
    plan, settings = run.recipe, run.settings
    effective = f"{plan.global_batch_size} = {plan.batch_size} x {run.launch.world_size} x {plan.accum_iter}"
    data, val = run.data_loader.data, run.val_loader.data
    interrupted = carry_out(
        run,
        f"{run.task.what}: {len(data)} images to train on, {len(val)} to test, {len(data.classes)} classes; crops of "
        f"{settings.input_size}, lr {settings.lr:.3e}, global batch {effective}, {plan.total_steps} updates",
    )
    weights = zero.full_state(run.layout, "master")
    found = ranks.by_first(lambda: write_results(run, weights or {}))
    if interrupted:
        raise KeyboardInterrupt
    return found


def write_results(run: DenseTuning, weights: dict[str, Tensor]) -> DenseResult:
    """Network, result.json and result.md of a finished run (rank 0)."""
    folder = Path(run.settings.output_dir)
    if run.done < run.recipe.total_steps:
        why = "preempted" if run.preempted else "stopped"
        print(
            f"{why} at update {run.done} of {run.recipe.total_steps}; run the same command to continue", file=sys.stderr
        )
        return DenseResult(folder, False, {}, [], None, None)
    records = [record for record in read_metrics(folder) if record["step"] <= run.done]
    tests = [record for record in records if run.figure in record]
    write_network(run, weights, folder / NETWORK_FILE)
    if not tests or tests[-1]["step"] != run.done:  # the disk was full
        raise UserError(f"{folder / METRICS_FILE} lacks the last test; make room, and add --evaluate to test again")
    seconds = sum(record["seconds"] for record in records)
    waited = sum(record["data_wait"] * record["seconds"] for record in records) / max(seconds, 1e-9)
    figures = {name: tests[-1][name] for name in run.task.shown if name in tests[-1]}
    figures |= {
        f"best_{run.figure}": max(record[run.figure] for record in tests),
        "data_wait": round(waited, 4),
        "gpu_hours": round(seconds * run.launch.world_size / 3600, 4),
    }
    return report(run.task, run.settings, run.origin, folder, figures)


def write_network(run: DenseTuning, weights: dict[str, Tensor], path: Path) -> None:
    """All weights and what batch norms have seen, as safetensors; the metadata holds the notes of the training."""
    buffers = {name: value.detach().cpu() for name, value in run.buffers().items()}
    tensors = {name: value.contiguous() for name, value in (weights | buffers).items()}
    metadata = {"notes": run.notes[run.task.kind.notes]}
    with files.writing(path, "make room and start again"), files.replacing(path) as aside:
        files.save_tensors(tensors, aside, metadata)
