"""Batch normalisation over all ranks equals that of the whole batch. The ranks run this file too (`main`)."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from fasthpm.cli import run_rank
from fasthpm.dense.segmentation.norms import SharedNorm
from fasthpm.ranks import launch
from tests.helpers.launch import check_ranks

SHARES = (3, 1)  # images of the two ranks: they need not have equally many


def maps() -> tuple[Tensor, Tensor]:
    """Maps and the gradients of what becomes of them: float64 [4, 5, 3, 2], far from 0."""
    generator = torch.Generator().manual_seed(0)
    values, gradients = torch.randn(2, 4, 5, 3, 2, dtype=torch.float64, generator=generator)
    return 1000 + 7 * values, gradients


def trained(norm: nn.BatchNorm2d, part: slice) -> dict[str, Tensor]:
    """What two updates of some of the maps give."""
    for _ in range(2):
        values, gradients = (whole[part].clone() for whole in maps())
        values.requires_grad_(True)
        out = norm(values)
        norm.zero_grad()
        out.backward(gradients)
    assert values.grad is not None
    return {
        "out": out.detach(),
        "grad": values.grad,
        **{name: weight.grad.clone() for name, weight in norm.named_parameters() if weight.grad is not None},
        "mean": norm.get_buffer("running_mean"),
        "variance": norm.get_buffer("running_var"),
    }


def start(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """With scales and shifts of their own."""
    norm.double()
    norm.weight.data.copy_(torch.linspace(0.5, 2, 5))
    norm.bias.data.copy_(torch.linspace(-1, 1, 5))
    return norm


def main(_: object = None) -> None:
    with launch.session() as here:
        begin = sum(SHARES[: here.rank])
        part = slice(begin, begin + SHARES[here.rank])
        torch.save(trained(start(SharedNorm(5)), part), Path(sys.argv[1]) / f"{here.rank}.pt")


def test_ranks_share_the_statistics_of_the_whole_batch(tmp_path: Path) -> None:
    check_ranks(Path(__file__), tmp_path, launcher="forked")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = trained(start(nn.BatchNorm2d(5)), slice(None))
    for name in ("out", "grad"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), whole[name], rtol=1e-8, atol=1e-8)
    for name in ("weight", "bias"):  # the engine adds up what the ranks have
        torch.testing.assert_close(first[name] + second[name], whole[name], rtol=1e-8, atol=1e-8)
    for name in ("mean", "variance"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], whole[name], rtol=1e-10, atol=1e-10)


def test_one_rank_is_torchs_norm() -> None:
    ours, theirs = start(SharedNorm(5)), start(nn.BatchNorm2d(5))
    found, expected = trained(ours, slice(None)), trained(theirs, slice(None))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close(ours.eval()(maps()[0]), theirs.eval()(maps()[0]))


def test_running_statistics_stay_in_float32_when_the_weights_are_cast() -> None:
    norm = SharedNorm(5)
    norm.running_mean = torch.full((5,), 1 + 2**-12)
    norm.bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean is not None
    assert norm.running_mean.dtype == torch.float32
    assert norm.running_mean[0] == 1 + 2**-12
    assert norm(maps()[0].bfloat16()).dtype == torch.bfloat16
    assert norm.double().get_buffer("running_mean").dtype == torch.float64


if __name__ == "__main__":
    run_rank(main)
