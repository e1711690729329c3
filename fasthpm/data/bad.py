"""Samples that do not decode: remembered, named once, and counted against a limit."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fasthpm.data.sampling import Array
from fasthpm.errors import UserError, warn

FEWEST, NAMED = 10, 10  # bad samples that are always accepted, and that an error names


class BadSample(NamedTuple):
    """A sample that does not decode: its number in the set, the file it is in or was made of, and what is wrong."""

    sample: int
    name: str
    why: str


_told: set[BadSample] = set()  # each is named once, whichever loader of this process meets it


def allowed(share: float, num_samples: int) -> int:
    """How many distinct bad samples a set may have: `share` of it, but at least `FEWEST`; none if `share` is 0."""
    return max(int(share * num_samples), FEWEST) if share > 0 else 0


def too_many(source: str, bad: Sequence[BadSample], share: float, num_samples: int, rest: str) -> UserError | None:
    """The error that ends a run, or None while `bad` stays within the limit. `rest` says where all are listed."""
    limit = allowed(share, num_samples)
    if len(bad) <= limit:
        return None
    others = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    found = "1 sample does" if len(bad) == 1 else f"{len(bad)} samples do"
    return UserError(
        f"{found} not decode, max_bad_samples {share:g} allows {limit} of the {num_samples} in {source}: "
        f"{', '.join(entry.name for entry in bad[:NAMED])}{others} ({rest}); copy or prepare the set again, or raise "
        f"--max_bad_samples"
    )


class Quarantine:
    """The bad samples that one loader has met.

    **Args:** `share`: see `allowed`; None: the first one is an error. `describe`: what to say of a sample.
    """

    def __init__(
        self, source: str, num_samples: int, share: float | None, describe: Callable[[int], BadSample]
    ) -> None:
        self._source, self._num_samples, self._share, self._describe = source, num_samples, share, describe
        self._met: dict[int, BadSample] = {}

    def add(self, ids: Array) -> None:
        """Remember `ids`, and say so once for each.

        **Raises:** `UserError` that names them when they become too many.
        """
        for sample in ids.tolist():
            if sample in self._met:
                continue
            bad = self._describe(sample)
            if self._share is None:
                raise UserError(f"{bad.name} {bad.why}; repair or remove it, copy the set again, or prepare it again")
            self._met[sample] = bad
            if bad not in _told:
                warn(f"{bad.name} {bad.why}; another sample takes its place")
            _told.add(bad)
        error = self._share is not None and too_many(
            self._source, self.met(), self._share, self._num_samples, "all are named in the warnings above"
        )
        if error:
            raise error

    def met(self) -> list[BadSample]:
        """All of them so far, in the order in which they were met."""
        return list(self._met.values())
