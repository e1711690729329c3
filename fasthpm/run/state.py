"""What a run holds between two updates, how it is saved and how it goes on."""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fasthpm import checkpoint, ranks, schedule
from fasthpm.checkpoint import shards
from fasthpm.checkpoint.saver import Job, Saver
from fasthpm.data import Batch, Loader
from fasthpm.errors import UserError, warn
from fasthpm.files import save_tensors
from fasthpm.maps.run import RunMaps
from fasthpm.patches import model_of
from fasthpm.ranks import zero
from fasthpm.recipe import Recipe, load_recipe, science_of
from fasthpm.run.bad_samples import BadSampleLog
from fasthpm.run.observer import Observer
from fasthpm.speed.graph import MicroStep
from fasthpm.teacher import EMATeacher

DISK_MINUTES, DEFAULT_DISK_MINUTES = "FASTHPM_DISK_MINUTES", 3.0  # how long the last checkpoint waits for a disk
RETRY_SECONDS = 5.0
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
    micro_step: MicroStep = dataclasses.field(init=False)  # forward, backward and update, or their graph
    bad_samples: BadSampleLog = dataclasses.field(init=False)
    seen: tuple[torch.Tensor, torch.Tensor | None] | None = None  # images and maps of the last micro-step
    done: int = 0  # updates
    saving: int = 0  # the update whose checkpoint was begun last
    unsaved: str = ""  # why it is lost, on rank 0
    data: str = ""  # what the data is, see `data.identity`
    preempted: bool = False  # a signal ends the run at this update
    skipped: list[int] = dataclasses.field(default_factory=list)  # updates (from 0) that are left out: not finite
    batches: Iterator[Batch] = dataclasses.field(init=False)  # from here on
    observers: list[Observer] = dataclasses.field(default_factory=list)
    attention: dict[str, str] = dataclasses.field(default_factory=dict)  # on a GPU: each shape's kernel, by name
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # further files of every checkpoint: name and text

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the student, whatever share of them this rank holds."""
        return sum(slot.shape.numel() for group in self.layout.groups for slot in group.slots)

    def buffers(self) -> dict[str, torch.Tensor]:
        """What training changes beside the parameters, by name; a checkpoint keeps rank 0's."""
        found: dict[str, torch.Tensor] = getattr(self.step, "kept", dict)()
        return found

    def reached(self) -> str:
        """How far it has come, for messages."""
        return f"after update {self.done}"

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
        checkpoint.check_counts(folder, run.recipe)
        state = checkpoint.read_state(folder)
        saved = shards.SavedState(folder)
        load_buffers(run, folder)
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
        if folder.resolve().parents[1] != Path(run.recipe.output_dir).resolve():
            for line in changes(load_recipe(folder / checkpoint.RECIPE), run, state.data):
                warn(line)


def changes(past: Recipe, run: Run[Any], data: str) -> list[str]:
    """What a run does otherwise than the one that wrote its checkpoint, where it branches off from another folder.

    - `past`: its recipe; `data`: what its data was
    """
    theirs, ours = science_of(past), science_of(run.recipe)
    same = data == run.data if data and run.data else theirs["data_path"] == ours["data_path"]
    names = [name for name in ours if ours[name] != theirs[name] and name not in ("recipe", "data_path")]
    lines = [f"{name} was {theirs[name]}, it is {ours[name]} from here on" for name in names]
    lines += [] if same else [f"the data was {past.data_path}, it is {run.recipe.data_path} from here on"]
    before, now = (schedule.lr_at(recipe, run.done) for recipe in (past, run.recipe))
    if not math.isclose(before, now, rel_tol=1e-6):
        lines.append(f"the learning rate of the next update is {now:.3g}, unchanged it would have been {before:.3g}")
    return lines


def save(run: Run[Any], *, say: bool = True) -> None:
    """Begin a checkpoint of all ranks; it is written while training goes on. Collective.

    A disk that is full loses this checkpoint, with a warning (unless not to `say` so), and nothing else.
    """
    finish_saving(run)
    output_dir = Path(run.recipe.output_dir)
    aside = [""]
    run.saving, run.unsaved = run.done, ""
    if run.launch.rank == 0:
        try:
            checkpoint.require_space(output_dir, run.num_parameters)
            aside = [str(begin(run, output_dir))]
        except (UserError, OSError) as error:
            not_saved(run, str(error), say=say)
    dist.broadcast_object_list(aside)
    if aside[0]:
        state = checkpoint.RunState(
            run.done, run.loader.state_dict(), run.launch.world_size, run.recipe.accum_iter, list(run.skipped), run.data
        )
        run.saver.start(Job(Path(aside[0]), run.saver.take(run.layout), run.recipe, state))


def begin(run: Run[Any], output_dir: Path) -> Path:
    """The folder that a checkpoint is written into, with notes and buffers in it. **Raises:** `OSError` for a disk."""
    aside = checkpoint.begin(output_dir, run.done, run.notes)
    if found := run.buffers():
        save_tensors({name: value.detach().cpu() for name, value in found.items()}, aside / checkpoint.BUFFERS)
    return aside


def load_buffers(run: Run[Any], folder: Path) -> None:
    """Take up the buffers of a checkpoint. **Raises:** `UserError` if they are not those of this run."""
    ours = run.buffers()
    path = folder / checkpoint.BUFFERS
    if not ours:
        return
    theirs = load_file(path) if path.is_file() else {}
    wrong = [name for name in ours.keys() | theirs.keys() if name not in ours or name not in theirs]
    wrong += [name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape]
    if wrong:
        raise UserError(f"{path} does not fit this network: {', '.join(sorted(wrong)[:3])}; use another --output_dir")
    for name, value in ours.items():
        value.copy_(theirs[name])


def finish_saving(run: Run[Any], *, say: bool = True) -> None:
    """Wait for the checkpoint that is being written, and `say` so if the disk did not take it."""
    problem = run.saver.wait()
    if problem and run.launch.rank == 0:
        not_saved(run, problem, say=say)


def not_saved(run: Run[Any], problem: str, *, say: bool = True) -> None:
    """Note, and print, that the checkpoint begun last is lost."""
    run.unsaved = problem
    if say:
        warn(f"the checkpoint of update {run.saving} was not written ({problem}); earlier ones are intact")


def finish_last_save(run: Run[Any], alive: Callable[[], None] = lambda: None) -> None:
    """Wait for the last checkpoint, without which a run is not finished. Collective.

    If the disk does not take it, it is tried again and again for `FASTHPM_DISK_MINUTES`; `alive` is called in between.

    **Raises:** `UserError` on all ranks if it was not written.
    """
    finish_saving(run)
    limit = ranks.minutes(DISK_MINUTES, DEFAULT_DISK_MINUTES).total_seconds()
    begin, output_dir = time.monotonic(), run.recipe.output_dir
    for attempt in itertools.count():
        again = [bool(run.unsaved) and not run.saver.unsound and time.monotonic() - begin < limit]
        dist.broadcast_object_list(again)
        if not again[0]:
            break
        if attempt == 0 and run.launch.rank == 0:
            warn(
                f"this checkpoint is the last: make room in {output_dir}; it is tried again every {RETRY_SECONDS:g} s "
                f"for {limit / 60:g} minutes ({DISK_MINUTES}), and Ctrl-C twice gives it up"
            )
        time.sleep(min(RETRY_SECONDS, limit))
        alive()
        save(run, say=False)
        finish_saving(run, say=False)
    with ranks.in_agreement():
        if run.unsaved and run.saver.unsound:
            raise UserError(
                f"the checkpoint of update {run.saving}, the last, was not written: {run.unsaved}; lower the learning "
                f"rate{checkpoint.way_on(Path(output_dir))}"
            )
        if run.unsaved:
            raise UserError(
                f"the checkpoint of update {run.saving}, the last, was not written; make room in {output_dir} and "
                f"start again to resume from the one before ({run.unsaved})"
            )


def endless(loader: Loader) -> Iterator[Batch]:
    """Batches of this epoch and all that follow."""
    while True:
        yield from loader
