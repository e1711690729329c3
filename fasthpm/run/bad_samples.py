"""The samples that do not decode, of all ranks together: listed in `bad_samples.csv`, and the run's end if too many."""

import csv
from pathlib import Path

import torch.distributed as dist

from fasthpm import ranks
from fasthpm.data import Loader
from fasthpm.data.bad import BadSample, too_many
from fasthpm.errors import warn
from fasthpm.files import replacing

FILE = "bad_samples.csv"


class BadSampleLog:
    """Gathers what the ranks' loaders met. `share`: the recipe's `max_bad_samples`.

    A run that continues (`keep`) goes on counting from the list in its output folder.
    """

    def __init__(self, output_dir: Path, source: str, share: float, *, rank: int, keep: bool) -> None:
        self.path, self._source, self._share, self._rank = output_dir / FILE, source, share, rank
        self._sent = 0
        self._stale = rank == 0 and not keep  # what lies there is another run's
        self._known = _read(self.path) if rank == 0 and keep else {}

    @property
    def count(self) -> int:
        """Distinct bad samples so far; known to rank 0."""
        return len(self._known)

    def update(self, loader: Loader) -> int:
        """Gather what is new, and return how many there are in all (on rank 0). Collective.

        **Raises:** `UserError` on every rank when there are more than the limit.
        """
        if self._stale:
            self.path.unlink(missing_ok=True)
            self._stale = False
        new = loader.bad_samples()[self._sent :]
        self._sent += len(new)
        everybody: list[list[BadSample]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everybody, new)
        if not any(everybody):
            return self.count
        fresh = {bad.sample: bad for part in everybody for bad in part if bad.sample not in self._known}
        error = None
        if self._rank == 0:
            self._known |= fresh
            met = list(self._known.values())
            self._write(met)
            error = too_many(self._source, met, self._share, loader.info.num_samples, f"all are listed in {self.path}")
        ranks.agree(error)
        return self.count

    def _write(self, met: list[BadSample]) -> None:
        try:
            with (
                replacing(self.path) as aside,
                aside.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
            ):
                csv.writer(file).writerows([BadSample._fields, *met])
        except OSError as error:
            warn(f"{self.path} could not be written ({error.strerror}); training goes on")


def _read(path: Path) -> dict[int, BadSample]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {int(row[0]): BadSample(int(row[0]), row[1], row[2]) for row in rows if len(row) == 3}
