"""Labels as texts: numbers, names, nothing."""

import pytest

from fasthpm.data.labels import UNLABELLED, count_unlabelled, counts_of, number_labels
from fasthpm.errors import UserError

NUMBERS = [str(k) for k in (0, 2, 10, 11, 1, 3)]


@pytest.mark.parametrize(
    ("texts", "labels", "classes"),
    [
        (NUMBERS, [0, 2, 10, 11, 1, 3], 12),
        ([f"{text}.0" for text in NUMBERS], [0, 2, 10, 11, 1, 3], 12),
        (["1.", "2.00", "0"], [1, 2, 0], 3),
        ([*NUMBERS, "-1"], [0, 2, 10, 11, 1, 3, -1], 12),
        (["-1", *NUMBERS, "", "-1.0"], [-1, 0, 2, 10, 11, 1, 3, -1, -1], 12),
        (["007", "7"], [7, 7], 8),
        (["cat", "", "ant", "-1"], [1, -1, 0, -1], 2),
        (["cat", "3", "ant", "cat"], [2, 0, 1, 2], 3),  # one number among names is a name
        (["1.5", "2.5"], [0, 1], 2),
        (["-1", "-1"], [-1, -1], 1),
        (["", ""], [0, 0], 1),  # no label anywhere: one class
    ],
)
def test_numbers_stay_numbers_and_nothing_is_no_class(texts: list[str], labels: list[int], classes: int) -> None:
    found, names = number_labels(texts)
    assert (found.tolist(), len(names)) == (labels, classes)
    assert count_unlabelled(found) == labels.count(UNLABELLED)
    assert sum(counts_of(found, classes)) == len(labels) - labels.count(UNLABELLED)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["label", *NUMBERS], "place 0 has the label 'label', a header, but 6 others .* such as 0; remove that line"),
        (["label", "3"], "a header, but 1 others"),
        (["what", *NUMBERS], "'what', perhaps a header"),
        ([*NUMBERS, "cat"], r"place 6 has the label 'cat', but 6 others have numbers such as 0; correct it, write -1"),
        ([*NUMBERS, "-2"], "place 6 has the label '-2'"),
        ([*NUMBERS, "1.5"], "place 6 has the label '1.5'"),
        ([*NUMBERS, "?", "?"], r"place 6 has the label '\?' \(2 are no numbers\)"),
        (["1", "10000000"], "place 1: label 10000000 is more than 1000000"),
    ],
)
def test_one_odd_label_among_numbers_is_one_line(texts: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        number_labels(texts, "place {}".format)
    assert "\n" not in str(error.value)
