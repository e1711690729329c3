"""What a run holds between two updates, how it is saved and how it goes on."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from fasthpm import checkpoint, ranks
from fasthpm.checkpoint import shards
from fasthpm.checkpoint.saver import Job, Saver
from fasthpm.data import Batch, Loader
from fasthpm.errors import UserError, warn
from fasthpm.maps.run import RunMaps
from fasthpm.patches import model_of
from fasthpm.ranks import zero
from fasthpm.recipe import Recipe
from fasthpm.run.bad_samples import BadSampleLog
from fasthpm.run.observer import Observer
from fasthpm.teacher import EMATeacher

Wrapped = TypeVar("Wrapped", bound=torch.nn.Module)


@dataclasses.dataclass
class Run(Generic[Wrapped]):
    """Everything a run holds between two updates; `Wrapped`: the module that DeepSpeed wraps."""

    recipe: Recipe
    launch: ranks.Launch
    loader: Loader
    engine: Any
    step: Wrapped
    teacher: EMATeacher | None
    layout: zero.MasterLayout
    saver: Saver
    maps: RunMaps | None = None
    bad_samples: BadSampleLog = dataclasses.field(init=False)
    seen: tuple[torch.Tensor, torch.Tensor | None] | None = None  # images and maps of the last micro-step
    done: int = 0  # updates
    saving: int = 0  # the update whose checkpoint was begun last
    unsaved: str = ""  # why it is lost, on rank 0
    preempted: bool = False  # a signal ends the run at this update
    skipped: list[int] = dataclasses.field(default_factory=list)  # updates (from 0) that are left out: not finite
    batches: Iterator[Batch] = dataclasses.field(init=False)  # from here on
    observers: list[Observer] = dataclasses.field(default_factory=list)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # further files of every checkpoint: name and text

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the student, whatever share of them this rank holds."""
        return sum(slot.shape.numel() for group in self.layout.groups for slot in group.slots)

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Full float32 {"student": …, "teacher": …} state dicts on rank 0, {} elsewhere. Collective."""
        kinds: dict[str, zero.State] = {"student": "master"}
        if self.teacher:
            kinds["teacher"] = "ema"
        gathered = {name: zero.full_state(self.layout, kind) for name, kind in kinds.items()}
        if self.launch.rank:
            return {}
        buffers = {name: value.float() for name, value in model_of(self.recipe).named_buffers()}
        return {
            name: {**{key.removeprefix("student."): value for key, value in (state or {}).items()}, **buffers}
            for name, state in gathered.items()
        }


def resume(run: Run[Any]) -> None:
    """Load the checkpoint that the recipe asks for, the same on every rank, and say so."""
    found: list[Path | None] = [None]
    with ranks.in_agreement():
        if run.launch.rank == 0:
            checkpoint.clear_unfinished(Path(run.recipe.output_dir))
            found[0] = checkpoint.find_resume(run.recipe, warn)
    dist.broadcast_object_list(found)
    if found[0] is not None:
        load(run, found[0])


def load(run: Run[Any], folder: Path) -> None:
    """Put the run where a checkpoint of it stands, and say so. Collective."""
    with ranks.in_agreement():
        state = checkpoint.read_state(folder)
        saved = shards.SavedState(folder)
    shards.restore(run.layout, saved)
    if run.teacher:
        run.teacher.refresh()
    # An update takes the same samples however many batches it is cut into.
    updates = state.loader["batch"] // state.accum_iter
    run.loader.load_state_dict({**state.loader, "batch": updates * run.recipe.accum_iter})
    run.batches = endless(run.loader)
    run.done = state.step
    run.skipped = sorted({*run.skipped, *state.skipped})
    with ranks.in_agreement():
        if run.maps and not run.maps.due_at(run.done, run.recipe.steps_per_epoch):
            run.maps.open(run.done // run.recipe.steps_per_epoch)
    if run.launch.rank == 0:
        writers = f"{state.world_size} rank{'s' if state.world_size > 1 else ''}"
        others = f", written by {writers}" if state.world_size != run.launch.world_size else ""
        print(f"resuming from {folder} at update {run.done} of {run.recipe.total_steps}{others}", file=sys.stderr)


def save(run: Run[Any]) -> None:
    """Begin a checkpoint of all ranks; it is written while training goes on. Collective.

    A disk that is full loses this checkpoint, with a warning, and nothing else.
    """
    finish_saving(run)
    output_dir = Path(run.recipe.output_dir)
    aside = [""]
    run.saving, run.unsaved = run.done, ""
    if run.launch.rank == 0:
        try:
            checkpoint.require_space(output_dir, run.num_parameters)
            aside = [str(checkpoint.begin(output_dir, run.done, run.notes))]
        except (UserError, OSError) as error:
            not_saved(run, str(error))
    dist.broadcast_object_list(aside)
    if aside[0]:
        state = checkpoint.RunState(
            run.done, run.loader.state_dict(), run.launch.world_size, run.recipe.accum_iter, list(run.skipped)
        )
        run.saver.start(Job(Path(aside[0]), run.saver.take(run.layout), run.recipe, state))


def finish_saving(run: Run[Any]) -> None:
    """Wait for the checkpoint that is being written, and say so if the disk did not take it."""
    problem = run.saver.wait()
    if problem and run.launch.rank == 0:
        not_saved(run, problem)


def not_saved(run: Run[Any], problem: str) -> None:
    """Note and print that the checkpoint begun last is lost."""
    run.unsaved = problem
    warn(f"the checkpoint of update {run.saving} was not written ({problem}); earlier ones are intact")


def finish_last_save(run: Run[Any]) -> None:
    """Wait for the last checkpoint, without which a run is not finished. Collective.

    **Raises:** `UserError` on all ranks if it was not written.
    """
    finish_saving(run)
    with ranks.in_agreement():
        if run.unsaved:
            raise UserError(
                f"the checkpoint of update {run.saving}, the last, was not written; make room in "
                f"{run.recipe.output_dir} and start again to resume from the one before"
            )


def endless(loader: Loader) -> Iterator[Batch]:
    """Batches of this epoch and all that follow."""
    while True:
        yield from loader
