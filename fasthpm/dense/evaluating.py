"""Testing a network that is there: our own, from its output folder, or one that others fine-tuned, from its file."""

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasthpm import checkpoint, files, ranks
from fasthpm.data.statistics import PixelStatistics, statistics_from
from fasthpm.dense import foreign, tuning
from fasthpm.dense.loader import DenseLoader
from fasthpm.dense.results import DenseResult, report
from fasthpm.dense.settings import complete
from fasthpm.dense.task import Task
from fasthpm.dense.values import shown_once
from fasthpm.errors import UserError, note_once, unlike, warn
from fasthpm.model import HPMViT
from fasthpm.probes import result
from fasthpm.probes.classifier import architecture
from fasthpm.probes.features import half
from fasthpm.run.versions import versions
from fasthpm.tuning.past import check_origin, differences, origin_of
from fasthpm.tuning.run import fitting_batch
from fasthpm.tuning.testing_again import UNKNOWN, check_set, counting

AUTO, EVALUATED = "auto", "evaluate"


def chosen(task: Task, arguments: argparse.Namespace, given: dict[str, Any], world_size: int) -> Any:
    """The recipe's settings, changed by the flags that were given; its batch per device as these devices share it."""
    name = arguments.recipe
    if name == AUTO:
        model = checkpoint.load_weights(arguments.run, given.get("weights", "student"))[0]
        name = task.recipe_for(model, given)
    settings = dataclasses.replace(scratch_aware(task.recipes[name](), given.get("from_scratch", False)), **given)
    if "batch_size" in given or "accum_iter" in given:
        return settings
    batch_size = fitting_batch(settings.batch_size, settings.global_batch_size, world_size)
    return dataclasses.replace(settings, batch_size=batch_size)


def scratch_aware(settings: Any, from_scratch: bool) -> Any:
    """A recipe's settings; of an encoder from scratch no layer knows anything yet, and all learn alike."""
    return dataclasses.replace(settings, layer_decay=1.0) if from_scratch else settings


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
    """Test the newest checkpoint of output_dir on the test set that is given, or was."""
    with ranks.in_agreement():
        settings = complete(chosen(task, arguments, given, launch.world_size), arguments.run, task.name)
        newest = checkpoint.newest_valid(Path(settings.output_dir), warn)
        if newest is None:
            raise UserError(f"{settings.output_dir} holds no checkpoint; train first, or give another --output_dir")
        notes = tuning.notes_of(task, newest)
        settings = as_trained(task, arguments.recipe, given, settings, notes["settings"], newest)
        model, _ = tuning.load_encoder(task, arguments.run, settings)
        check_model(newest, notes, model, arguments.run)
        origin = result.provenance(arguments.run, launch)
        check_origin(task.kind, newest, origin)
        pixels = statistics_from(notes) or PixelStatistics(tuple(notes["mean"]), tuple(notes["std"]))
        shown_once(pixels, settings.show)
        val, drawn = tuning.test_loaders(task, settings, model.in_chans, launch, pixels)
        if list(val.data.classes) != notes["classes"]:
            what = unlike(f"the network in {newest}", notes["classes"], val.data.source, val.data.classes)
            raise UserError(f"{what}; give the data that it was trained for")
        network = restored(task, model, settings, val, newest).to(launch.device).eval()
    seen = Evaluation(task, settings, launch, pixels, val, drawn)
    return measured(seen, network, Path(settings.output_dir) / EVALUATED, origin_of(task.kind, newest, origin))


def as_trained(
    task: Task, recipe: str, given: dict[str, Any], settings: Any, stored: dict[str, Any], folder: Path
) -> Any:
    """`settings` of a test: those that the network of the checkpoint `folder` was trained by, `stored`, and what of
    those `given` counts. Where other data is given, none of the places of the former count.

    **Raises:** `UserError` for what is given and is not as it was.
    """
    whose = f"the network in {folder}"
    ours = counting(task.settings, given, stored, whose)
    if recipe != AUTO:
        implied = scratch_aware(task.recipes[recipe](), stored.get("from_scratch", False))
        own = {name for other in task.recipes.values() for name in other().differing(task.settings())} - given.keys()
        check_set(f"--recipe {recipe}", {name: getattr(implied, name) for name in sorted(own)}, stored, whose)
    places = task.settings.PLACES
    nowhere = dict.fromkeys(places, "") if task.settings.TESTS & given.keys() & {*places} else {}
    return dataclasses.replace(settings, **{**stored, **nowhere, **ours})


def evaluate_foreign(
    task: Task, arguments: argparse.Namespace, given: dict[str, Any], launch: ranks.Launch
) -> DenseResult:
    """Test a network that others fine-tuned, the file `arguments.run`, on the test set that is given.

    **Raises:** `UserError` naming what of the file has no place here, or if it is of another task or other classes.
    """
    path: Path = arguments.run
    with ranks.in_agreement():
        found = foreign.read(path)
        if found.kind != task.name:
            raise UserError(f"{path} is a network for fasthpm {found.kind}; use that")
        network, model = foreign.network(found), found.model()
        name = task.recipe_for(model, given) if arguments.recipe == AUTO else arguments.recipe
        folder = str(path.parent / f"{path.stem}_{task.name}")
        science = {**dict.fromkeys(task.settings().science, UNKNOWN), "input_size": found.input_size}
        ours = counting(task.settings, given, science, f"the network in {path}")
        fitting = {"output_dir": folder, "input_size": found.input_size, **ours}
        settings = dataclasses.replace(task.recipes[name](), **fitting)
        shown_once(found.pixels, settings.show)
        val, drawn = tuning.test_loaders(task, settings, model.in_chans, launch, found.pixels)
        if len(val.data.classes) != found.head["num_classes"]:
            raise UserError(
                f"{path} tells {found.head['num_classes']} classes apart, {val.data.source} has "
                f"{len(val.data.classes)}; give the data that it was trained for"
            )
        task.settle(network, settings)
        network = network.to(launch.device).eval()
        origin: dict[str, Any] = {"run": str(path), "checkpoint": str(path), "checkpoint_hash": files.file_hash(path)}
    if launch.rank == 0:
        for line in found.notes:
            note_once(line)
    origin["versions"] = versions(launch.device, launch.world_size)
    seen = Evaluation(task, settings, launch, found.pixels, val, drawn)
    return measured(seen, network, Path(settings.output_dir), origin)


def measured(seen: Evaluation, network: nn.Module, folder: Path, origin: dict[str, Any]) -> DenseResult:
    """Test, draw, and write what was found. Collective."""
    begin = time.perf_counter()
    with ranks.in_agreement():
        if seen.launch.rank == 0:
            with files.writing(folder, "choose another --output_dir"):
                folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), half(seen.launch.device):
        figures: dict[str, Any] = tuning.tested(seen, network, folder, draw=True)
    figures["gpu_hours"] = round((time.perf_counter() - begin) * seen.launch.world_size / 3600, 4)
    return ranks.by_first(lambda: report(seen.task, seen.settings, origin, folder, figures))


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
    fixed = {name for name, _ in network.named_buffers() if name.rpartition(".")[2] not in tuning.STATISTICS}
    if missing.unexpected_keys or set(missing.missing_keys) - fixed:
        raise UserError(f"{folder} does not fit this network: {missing}; use the version that wrote it")
    return network
