"""Tables of patches and of their pixels, by plain loops."""

import torch

from fasthpm.dense import confusion


def test_pixels_get_the_class_of_their_patch() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 5, (40, 4), generator=generator)  # three classes, and ignored ones
    predicted = torch.randint(0, 3, (40,), generator=generator)
    want = [[0] * 3 for _ in range(3)]
    for row, guess in zip(counts.tolist(), predicted.tolist(), strict=True):
        for truth in range(3):
            want[truth][guess] += row[truth]
    assert confusion.of_pixels(counts, predicted).tolist() == want


def test_chance_is_what_many_guesses_come_to() -> None:
    truth, learned = torch.tensor([600, 300, 0]), torch.tensor([1, 2, 1])
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(3), truth)
    tables = torch.zeros(3, 3)
    for _ in range(200):
        guesses = torch.multinomial(learned.double(), len(labels), replacement=True, generator=generator)
        for one, other in ((a, b) for a in range(3) for b in range(3)):
            tables[one, other] += ((labels == one) & (guesses == other)).sum()
    torch.testing.assert_close(confusion.by_chance(truth, learned).float(), tables / 200, rtol=0.05, atol=1.0)


def test_frequencies_leave_ignored_ones_out() -> None:
    assert confusion.frequencies(torch.tensor([2, 0, 255, 2]), 4).tolist() == [1, 0, 2, 0]
