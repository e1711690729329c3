"""The command of a dense task: its flags, training or evaluating, and what is written at the end."""

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasthpm import checkpoint, files, ranks
from fasthpm.cli import Arguments, Parser
from fasthpm.data.statistics import PixelStatistics
from fasthpm.dense import tuning
from fasthpm.dense.loader import DenseLoader
from fasthpm.dense.settings import complete
from fasthpm.dense.task import Task
from fasthpm.dense.tuning import DenseTuning
from fasthpm.entry import Result
from fasthpm.errors import UserError, nearest, warn
from fasthpm.model import HPMViT
from fasthpm.options import add_recipe_arguments
from fasthpm.probes import result
from fasthpm.probes.classifier import architecture
from fasthpm.probes.features import half
from fasthpm.ranks import zero
from fasthpm.run.lock import FolderLock
from fasthpm.run.records import METRICS_FILE, read_metrics
from fasthpm.tuning.loop import carry_out
from fasthpm.tuning.past import differences

AUTO = "auto"
NETWORK_FILE, EVALUATED = "network.safetensors", "evaluate"


@dataclass(frozen=True, repr=False)
class DenseResult(Result):
    """What the training of a dense task, or a test of one, has come to."""

    output_dir: Path
    finished: bool  # False: stopped before its last update; the same call continues
    figures: dict[str, float]  # in percent, and more; {} unless it is finished
    classes: list[dict[str, Any]]  # a row per class
    network: Path | None
    picture: Path | None


# -------------------------------------------------------------------------------------------------- command
def main(task: Task, argv: Arguments = None) -> DenseResult:
    """`fasthpm segment`, `fasthpm detect` and their functions, once per rank."""
    arguments, given = parse_arguments(task, argv)
    with ranks.session() as launch:
        if given.get("evaluate"):
            return evaluate_only(task, arguments, given, launch)
        with ranks.in_agreement():
            settings = chosen(task, arguments, given)
        with FolderLock(launch.rank) as lock:
            return train(tuning.build(task, arguments.run, settings, launch, lock))


def parse_arguments(task: Task, argv: Arguments) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(run, recipe), and the settings that were given."""
    parser = Parser(prog=f"fasthpm {task.name}", description=task.summary)
    parser.add_argument(
        "run", type=Path, help="output_dir of a pretraining run or an import, or one of its checkpoints"
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
    return arguments, {name: value for name, value in vars(arguments).items() if name in known_fields}


def chosen(task: Task, arguments: argparse.Namespace, given: dict[str, Any]) -> Any:
    """The recipe's settings, changed by the flags that were given."""
    name = arguments.recipe
    if name == AUTO:
        model = checkpoint.load_weights(arguments.run, given.get("weights", "student"))[0]
        name = task.recipe_for(model, given)
    base = task.recipes[name]()
    return dataclasses.replace(base, **given)


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


def report(task: Task, settings: Any, origin: dict[str, Any], folder: Path, figures: dict[str, Any]) -> DenseResult:
    """Write result.json and result.md, say the figures and where they are."""
    table, picture = tuning.table_of(folder), folder / tuning.PICTURE_FILE
    from_scratch = ", from scratch" if settings.from_scratch else ""
    made = {
        "protocol": f"{task.name}, {settings.steps} updates of {settings.global_batch_size}{from_scratch}",
        **figures,
        **origin,
        "settings": dataclasses.asdict(settings),
        "classes": table,
    }
    shown = ("recipe", "protocol", *task.shown, "effective_epochs", "pretraining_gpu_hours", "gpu_hours")
    row = result.write_result(folder, made, shown, per_class(table))
    said = ", ".join(f"{name} {figures[name]:.2f} %" for name in task.shown if name in figures)
    print(f"{made['protocol']}: {said}\n{row}")
    print(f"written to {folder / 'result.json'}", file=sys.stderr)
    if picture.is_file():
        print(f"images, truth and prediction: {picture}", file=sys.stderr)
    network = folder / NETWORK_FILE
    return DenseResult(
        folder, True, figures, table, network if network.is_file() else None, picture if picture.is_file() else None
    )


def per_class(table: list[dict[str, Any]]) -> str:
    """The rows of classes as Markdown; empty without any."""
    if not table:
        return ""
    names = list(table[0])
    rows = [f"| {' | '.join('' if row[n] is None else _cell(row[n]) for n in names)} |" for row in table]
    return "\n".join([f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *rows]) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


# -------------------------------------------------------------------------------------------------- evaluating
@dataclass(frozen=True)
class Evaluation:
    """What `tuning.tested` reads, without a training."""

    task: Task
    settings: Any
    launch: ranks.Launch
    pixels: PixelStatistics
    val_loader: DenseLoader
    drawn_loader: DenseLoader


def evaluate_only(
    task: Task, arguments: argparse.Namespace, given: dict[str, Any], launch: ranks.Launch
) -> DenseResult:
    """Test the newest checkpoint of output_dir on the test set that is given."""
    with ranks.in_agreement():
        settings = complete(chosen(task, arguments, given), arguments.run, task.name)
        newest = checkpoint.newest_valid(Path(settings.output_dir), warn)
        if newest is None:
            raise UserError(f"{settings.output_dir} holds no checkpoint; train first, or give another --output_dir")
        notes = tuning.notes_of(task, newest)
        ours = {name: given[name] for name in given if name not in notes["settings"] or name == "data_path"}
        settings = dataclasses.replace(settings, **{**notes["settings"], **ours})
        model, _ = tuning.load_encoder(task, arguments.run, settings)
        check_model(newest, notes, model, arguments.run)
        val, drawn = tuning.test_loaders(task, settings, model.in_chans, launch)
        if list(val.data.classes) != notes["classes"]:
            raise UserError(
                f"the network in {newest} has {len(notes['classes'])} classes, {val.data.source} has "
                f"{len(val.data.classes)} or others; give the data that it was trained for"
            )
        network = restored(task, model, settings, val, newest).to(launch.device).eval()
        origin = result.provenance(arguments.run, launch)
    folder = Path(settings.output_dir) / EVALUATED
    begin = time.perf_counter()
    pixels = PixelStatistics(tuple(notes["mean"]), tuple(notes["std"]))
    with ranks.in_agreement():
        if launch.rank == 0:
            with files.writing(folder, "choose another --output_dir"):
                folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), half(launch.device):
        seen = Evaluation(task, settings, launch, pixels, val, drawn)
        figures = tuning.tested(seen, network, folder, draw=True)
    hours = (time.perf_counter() - begin) * launch.world_size / 3600
    return ranks.by_first(lambda: report(task, settings, origin, folder, {**figures, "gpu_hours": round(hours, 4)}))


def check_model(folder: Path, notes: dict[str, Any], model: HPMViT, run: Path) -> None:
    """Refuse a run that the network did not come from. **Raises:** `UserError`."""
    ours = json.loads(json.dumps(architecture(model)))
    if notes["model"] != ours:
        raise UserError(
            f"{folder} is of another architecture than {run} ({differences(notes['model'], ours)}); give the run that "
            f"it came from"
        )


def restored(task: Task, model: HPMViT, settings: Any, val: DenseLoader, folder: Path) -> nn.Module:
    """The network of a checkpoint."""
    network = task.network(model, settings, val.data)
    missing = network.load_state_dict(tuning.saved_state(folder), strict=False)
    buffers = {name for name, _ in network.named_buffers()}
    if missing.unexpected_keys or set(missing.missing_keys) - buffers:
        raise UserError(f"{folder} does not fit this network: {missing}; use the version that wrote it")
    return network
