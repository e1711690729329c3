"""What a label is: the one place that reads them, for lists, tar shards, parquet files and videos."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

UNLABELLED = -1  # a state of its own, not a class: such samples are kept and counted
MAX_LABEL = 1_000_000
NUMBER = re.compile(r"\d+(\.0*)?")  # "3", and "3.0" as spreadsheets and pandas write it
NONE = re.compile(r"|-1(\.0*)?")
LABEL_WORDS = ("label", "labels", "class", "classes", "category", "target", "cls", "y", "id")
LABEL_HEADS = re.compile(rf"({'|'.join(LABEL_WORDS)})([_ -]?(id|idx|index|name|number|num|nr))?", re.IGNORECASE)


def is_unlabelled(text: str) -> bool:
    """Whether a label's text says that there is none: nothing, or -1."""
    return NONE.fullmatch(text) is not None


def number_labels(
    texts: Sequence[str], place: Callable[[int], str] = "sample {}".format
) -> tuple[Array, tuple[str, ...]]:
    """Labels int64 [N] and class names: whole numbers stand for themselves, names for their place in the alphabet.

    Nothing and -1 become `UNLABELLED`; where no text says anything, all samples are of one class, "all".

    **Args:** `place`: where a text stands, by its number, for messages.

    **Raises:** `UserError` for an absurd number, and for one or a few that are no numbers among numbers: they would
    make names of all of them, in alphabetical order.
    """
    given = [(index, text) for index, text in enumerate(texts) if not is_unlabelled(text)]
    if not given:
        return np.full(len(texts), UNLABELLED if any(texts) else 0, np.int64), ("all",)
    odd = [(index, text) for index, text in given if not NUMBER.fullmatch(text)]
    if odd and (len(odd) < len(given) - len(odd) or (odd[0][0] == 0 and len(odd) == 1 < len(given))):
        raise UserError(_odd_one(odd, given, place))
    if odd:
        classes = tuple(sorted({text for _, text in given}))
        table = {text: index for index, text in enumerate(classes)}
    else:
        table = {text: int(text.partition(".")[0]) for text in {text for _, text in given}}
        largest = max(table, key=lambda text: table[text])
        if table[largest] > MAX_LABEL:
            where = place(next(index for index, text in given if text == largest))
            raise UserError(f"{where}: label {largest} is more than {MAX_LABEL}; number the classes from 0")
        classes = tuple(map(str, range(table[largest] + 1)))
    return np.array([table.get(text, UNLABELLED) for text in texts], np.int64), classes


def _odd_one(odd: list[tuple[int, str]], given: list[tuple[int, str]], place: Callable[[int], str]) -> str:
    index, text = odd[0]
    number = next(text for _, text in given if NUMBER.fullmatch(text))
    what, remedy = "", "; correct it, write -1 for unlabelled, or write names, such as c12, in all"
    if index == 0 and len(odd) == 1:
        what = f", {'a header' if LABEL_HEADS.fullmatch(text) else 'perhaps a header'}"
        remedy = f"; remove that line if it is a header{'' if LABEL_HEADS.fullmatch(text) else f', else{remedy[1:]}'}"
    more = f" ({len(odd)} are no numbers)" if len(odd) > 1 else ""
    return (
        f"{place(index)} has the label {text[:80]!r}{what}{more}, but {len(given) - len(odd)} others have numbers such "
        f"as {number}{remedy}"
    )


def count_unlabelled(labels: Array) -> int:
    """How many of int64 [N] are `UNLABELLED`."""
    return int((np.asarray(labels) == UNLABELLED).sum())


def counts_of(labels: Array, num_classes: int) -> list[int]:
    """Samples of each class; the unlabelled ones are in none."""
    labels = np.asarray(labels)
    return np.bincount(labels[labels != UNLABELLED], minlength=num_classes).tolist()
