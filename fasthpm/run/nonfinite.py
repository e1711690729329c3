"""What happens to an update whose loss or gradient is not finite: halt, skip or rollback."""

from pathlib import Path

import torch.distributed as dist

from fasthpm import checkpoint, ranks
from fasthpm.errors import UserError, warn
from fasthpm.run.health import NotFinite
from fasthpm.run.metrics import Metrics
from fasthpm.run.state import Run, finish_saving, load, save
from fasthpm.step import Step


def leave_out(run: Run[Step], metrics: Metrics, bad: int, folder: Path) -> None:
    """Count update `bad` (from 0) among those that are left out.

    **Raises:** `UserError` on all ranks if these are too many.
    """
    run.skipped = sorted({*run.skipped, bad})
    if len(run.skipped) > run.recipe.max_nonfinite:
        ranks.agree(
            UserError(
                f"{len(run.skipped)} updates were not finite, more than max_nonfinite {run.recipe.max_nonfinite}; look "
                f"at their samples in {folder.parent}, lower --blr"
                f"{checkpoint.ways_on(Path(run.recipe.output_dir), 'blr')}; or allow more with --max_nonfinite"
            )
        )
    if run.launch.rank == 0:
        warn(f"update {bad + 1} is left out: its loss or gradient is not finite; see {folder}")


def save_first(run: Run[Step]) -> None:
    """Save before the first update, so that there is a checkpoint to go back to; not if there is one. Collective."""
    there = [False]
    if run.launch.rank == 0:
        there[0] = checkpoint.newest_valid(Path(run.recipe.output_dir), lambda line: None) is not None
    dist.broadcast_object_list(there)
    if not there[0]:
        save(run)


def roll_back(run: Run[Step], metrics: Metrics, found: NotFinite) -> None:
    """Go back to the last checkpoint, and leave out the update that was not finite. Collective.

    **Raises:** `found` if the run is to end instead, `UserError` if too many are left out or no checkpoint is sound.
    """
    if run.recipe.on_nonfinite != "rollback":
        raise found
    leave_out(run, metrics, found.first, metrics.forensics(found.first))
    finish_saving(run)
    newest: list[Path | None] = [None]
    if run.launch.rank == 0:
        newest[0] = checkpoint.newest_valid(Path(run.recipe.output_dir), warn)
    dist.broadcast_object_list(newest)
    if newest[0] is None:
        raise found
    load(run, newest[0])
    metrics.rewind(run.done)
