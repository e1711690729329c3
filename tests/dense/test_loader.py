"""Order, ranks, resuming and bad samples of dense sets."""

from typing import Any

import numpy as np
import pytest
import torch

from fasthpm.data.sampling import Array
from fasthpm.dense.loader import DenseBatch, DenseLoader, DenseOptions, Unreadable
from fasthpm.errors import UserError


class Numbers:
    """Sample i is the number i; some cannot be read."""

    source, classes = "numbers", ("a",)

    def __init__(self, count: int, bad: tuple[int, ...] = (), often: Array | None = None) -> None:
        self.count, self.bad, self.often = count, bad, often

    def __len__(self) -> int:
        return self.count

    def name(self, sample: int) -> str:
        return f"numbers/{sample}"

    def read(self, sample: int) -> int:
        if sample in self.bad:
            raise Unreadable("is bad")
        return sample

    def repeats(self) -> Array | None:
        return self.often


def drawn(number: int, numbers: np.random.Generator) -> tuple[int, float]:
    return number, float(numbers.random())


def collate(samples: list[tuple[int, float]]) -> tuple[Any, Any]:
    return torch.tensor([one for one, _ in samples]), [{"noise": torch.tensor(noise)} for _, noise in samples]


def loader(data: Numbers, **options: Any) -> DenseLoader:
    return DenseLoader(
        data, drawn, collate, DenseOptions(**{"batch_size": 2, "train": True, "num_workers": 1, **options})
    )


def take(source: DenseLoader, count: int) -> list[DenseBatch]:
    batches = iter(source)
    return [next(batches) for _ in range(count)]


def rows(batches: list[DenseBatch]) -> list[tuple[int, float]]:
    return [
        (int(number), float(target["noise"]))
        for batch in batches
        for number, target in zip(batch.images, batch.targets, strict=True)
    ]


def test_an_epoch_has_every_sample_once_and_the_next_another_order_and_other_draws() -> None:
    first, second = rows(take(loader(Numbers(10)), 5)), rows(take(loader(Numbers(10)), 10))[10:]
    assert sorted(number for number, _ in first) == sorted(number for number, _ in second) == list(range(10))
    assert [number for number, _ in first] != [number for number, _ in second]
    assert {noise for _, noise in first}.isdisjoint(noise for _, noise in second)


def test_ranks_and_workers_see_the_batches_of_one() -> None:
    whole = rows(take(loader(Numbers(12), batch_size=4), 6))
    shares = [take(loader(Numbers(12), rank=rank, world_size=2, num_workers=2), 6) for rank in (0, 1)]
    assert [row for pair in zip(*shares, strict=True) for row in rows(list(pair))] == whole


@pytest.mark.parametrize("after", [1, 3, 4])
def test_it_goes_on_where_it_stopped(after: int) -> None:
    whole, first, second = loader(Numbers(9)), loader(Numbers(9)), loader(Numbers(9))
    take(first, after)
    second.load_state_dict(first.state_dict())
    assert rows(take(second, 6)) == rows(take(whole, 6 + after))[2 * after :]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_test_reads_every_sample_once_over_all_ranks_in_order(world_size: int) -> None:
    shares = [list(loader(Numbers(7), train=False, rank=r, world_size=world_size)) for r in range(world_size)]
    assert len({len(share) for share in shares}) == 1  # ranks meet in collectives
    ids = [batch.ids.tolist() for turn in zip(*shares, strict=True) for batch in turn]
    assert [one for batch in ids for one in batch] == list(range(7))


def test_bad_samples_are_replaced_marked_and_listed() -> None:
    data = loader(Numbers(10, bad=(3, 4)))
    batches = take(data, 5)
    ids = torch.cat([batch.ids for batch in batches])
    assert not set(ids.tolist()) & {3, 4}
    assert int(torch.cat([batch.replaced for batch in batches]).sum()) == 2
    assert {(bad.sample, bad.name, bad.why) for bad in data.bad_samples()} == {
        (3, "numbers/3", "is bad"),
        (4, "numbers/4", "is bad"),
    }


def test_too_many_bad_samples_end_the_training_by_name() -> None:
    with pytest.raises(UserError, match="numbers/"):
        take(loader(Numbers(40, bad=tuple(range(20)))), 20)


def test_a_set_of_bad_samples_only_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="is bad, and 20 samples tried") as caught:
        take(loader(Numbers(4, bad=(0, 1, 2, 3))), 2)
    assert "\n" not in str(caught.value)


def test_a_bad_sample_of_a_test_is_an_error() -> None:
    with pytest.raises(UserError, match="numbers/2 is bad; repair") as caught:
        list(loader(Numbers(4, bad=(2,)), train=False))
    assert "\n" not in str(caught.value)


def test_a_set_smaller_than_an_update_is_refused() -> None:
    with pytest.raises(UserError, match="has 7 samples for training, fewer than the 8 of an update"):
        loader(Numbers(7), accum_iter=2, world_size=2)


def test_rare_samples_come_more_often() -> None:
    often = np.array([1.0] * 30 + [2.5] * 10)
    data = loader(Numbers(40, often=often), batch_size=4)
    counts = np.bincount(np.concatenate([data.order(epoch) for epoch in range(200)]), minlength=40) / 200
    assert counts[:30] == pytest.approx(1.0)
    assert counts[30:].mean() == pytest.approx(2.5, abs=0.1)
    assert counts[30:].min() >= 2.3
    assert data.order(0).tolist() != data.order(1).tolist()


def test_moving_reaches_every_tensor() -> None:
    batch = DenseBatch([torch.zeros(1)], [{"boxes": torch.zeros(2), "name": "x"}], torch.zeros(1), torch.zeros(1))
    moved = batch.to(torch.device("meta"))
    assert moved.images[0].is_meta
    assert moved.targets[0]["boxes"].is_meta
    assert moved.targets[0]["name"] == "x"
