"""The kernels of `fasthpm.kernels.pairs` in Triton's interpreter, which knows numpy and no GPU, against their twins.

A program: Triton must know before it is imported that it is to interpret. It stands in for a GPU's arithmetic; its
exp and log are numpy's.
"""

import os
import time

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fasthpm import loss
from fasthpm.kernels import launched, pairs

NAN, INF = float("nan"), float("inf")


@contextmanager
def blocks(rows: int, columns: int) -> Iterator[None]:
    """Kernels that compare so many patches at a time; the interpreter takes as long for few as for many."""
    usual = pairs.ROWS, pairs.COLUMNS
    pairs.ROWS, pairs.COLUMNS = rows, columns
    try:
        yield
    finally:
        pairs.ROWS, pairs.COLUMNS = usual


def drawn(seed: int, batch: int, count: int, ties: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted, actual and the teacher's difficulty [B, M]; `ties`: how many values the last two have."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randn(batch, count, generator=generator) * 4
    actual, seen = (torch.rand(batch, count, generator=generator) for _ in range(2))
    return (predicted, (actual * ties).floor(), (seen * ties).floor()) if ties else (predicted, actual, seen)


def ranked(values: Tensor) -> Tensor:
    """Values that torch's `argsort` cannot but put in the order of `loss.spearman`: equal ones by number, nan last."""
    return values.float().argsort(dim=1, stable=True).argsort(dim=1).float()


def check_ranking(predicted: Tensor, actual: Tensor) -> None:
    """Value and gradient are the twin's within float32's rounding, or no numbers where the twin's are none."""
    value, slope = launched("ranking", predicted, actual)
    exact = predicted.double()
    want, gradient = loss._ranking_blocks(exact, actual.double())
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-7, equal_nan=True)
    largest = gradient.nan_to_num().abs().max().item()
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-5, atol=1e-6 * largest, equal_nan=True)


def check_health(got: Tensor, predicted: Tensor, actual: Tensor, seen: Tensor) -> None:
    """`got` is what the twin says, equal values in order of their numbers."""
    ranks = [ranked(values) for values in (predicted, actual, seen)]
    want = (loss.spearman(*ranks[:2]), loss.pair_accuracy(predicted, actual), loss.spearman(ranks[2], ranks[1]))
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-6)


def check(predicted: Tensor, actual: Tensor, seen: Tensor) -> None:
    """Both kernels."""
    check_ranking(predicted, actual)
    check_health(launched("health", predicted, actual, seen), predicted, actual, seen)


def check_shapes() -> None:
    """Blocks that fit, blocks with a rest, several programs; with and without ties; strided, in 16 bits."""
    cases = "1 2 16 64 0, 3 16 16 64 0, 2 33 16 64 3, 2 70 32 64 0, 2 21 8 8 2, 1 64 64 16 4"
    for seed, case in enumerate(cases.split(", ")):
        batch, count, rows, columns, ties = map(int, case.split())
        predicted, actual, seen = drawn(seed, batch, count, ties)
        with blocks(rows, columns):
            check(predicted, actual, seen)
    strided = predicted.t().contiguous().t(), actual.t().contiguous().t()
    check_ranking(*strided)
    low = predicted.bfloat16(), actual.half(), seen.double()
    check_health(launched("health", *low), *low)


def check_sizes_of_training() -> None:
    """147 masked patches of images, 1,411 of clips."""
    with blocks(256, 512):
        for batch, count in ((4, 147), (2, 1411)):
            check(*drawn(count, batch, count))


def check_odd_values() -> None:
    """All equal; well and badly ordered beyond what exp takes; losses and predictions that are no numbers."""
    predicted, actual, seen = drawn(0, 2, 9)
    with blocks(8, 16):
        check(torch.zeros(2, 9), torch.ones(2, 9), -torch.zeros(2, 9))
        for scale in (1e-4, 300.0, -300.0):
            check_ranking(actual * scale, actual)
        for place in (0, 8):
            odd = actual.clone()
            odd[0, place], odd[1, place], odd[1, 3] = NAN, INF, -INF
            check(predicted, odd, seen)
            check_health(launched("health", odd, actual, odd), odd, actual, odd)
            odd = predicted.clone()
            odd[1, place] = NAN
            check(odd, actual, odd)
    assert launched("ranking", predicted, actual)[0].isfinite()


def check_the_way_to_them() -> None:
    """`loss.ranking_loss` and `loss.health` of a device that is no CPU, in 16, 32 and 64 bits."""
    usual, loss.on_cpu = loss.on_cpu, lambda values: False
    try:
        predicted, actual, seen = drawn(3, 2, 20)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            inputs = predicted.to(dtype).requires_grad_()
            value, health = loss.ranking_loss(inputs, actual), loss.health(inputs, actual, seen)
            (gradient,) = torch.autograd.grad(3 * value, inputs)
            plain = inputs.detach().double().requires_grad_()
            want = loss.ranking_loss_plain(plain, actual)
            (slope,) = torch.autograd.grad(3 * want, plain)
            assert value.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient.double(), slope, rtol=1e-2 if dtype.itemsize < 4 else 1e-5, atol=1e-6)
            check_health(health, inputs.detach(), actual, seen)
        for shape in ((2, 1), (0, 5)):
            inputs = torch.full(shape, NAN, requires_grad=True)
            value = loss.ranking_loss(inputs, torch.zeros(shape))
            value.backward()
            assert value == 0
            assert not inputs.grad.any()
        assert loss.health(*torch.zeros(3, 2, 1)).tolist() == [1, 0, 1]
    finally:
        loss.on_cpu = usual


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in (check_shapes, check_sizes_of_training, check_odd_values, check_the_way_to_them):
        begin = time.perf_counter()
        part()
        print(f"{part.__name__}: right, {time.perf_counter() - begin:.1f} s")
