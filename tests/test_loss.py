"""Losses and the predictor's health against `reference.py`: values and gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasthpm import loss
from tests.helpers import reference
from tests.helpers.golden import GOLDEN

shapes = st.tuples(st.integers(1, 3), st.integers(1, 7))
seeds = st.integers(0, 2**31)


def scores(seed: int, shape: tuple[int, int], ties: bool) -> tuple[Tensor, Tensor]:
    """Random predictions that want gradients, and actual losses with or without ties; float64."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    actual = torch.rand(shape, generator=generator, dtype=torch.float64)
    return predicted.requires_grad_(), ((actual * 2).round() if ties else actual)


def check(fast: Tensor, slow: Tensor, inputs: Tensor) -> None:
    """Values and gradients agree."""
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(x, inputs, allow_unused=True, retain_graph=True)[0] for x in (fast, slow)]
    gradients = [torch.zeros_like(inputs) if g is None else g for g in gradients]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, shape=shapes, ties=st.booleans())
def test_ranking_loss_is_eq_5(seed: int, shape: tuple[int, int], ties: bool) -> None:
    predicted, actual = scores(seed, shape, ties)
    check(loss.ranking_loss(predicted, actual), reference.ranking_loss(predicted, actual), predicted)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, shape=shapes, ties=st.booleans(), elements=st.integers(1, 60))
def test_ranking_loss_and_pair_accuracy_are_the_same_in_blocks_of_any_size(
    seed: int, shape: tuple[int, int], ties: bool, elements: int
) -> None:
    predicted, actual = scores(seed, shape, ties)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.BLOCK_ELEMENTS, "cpu", elements)
        value, share = loss.ranking_loss(predicted, actual), loss.pair_accuracy(predicted, actual)
    check(value, reference.ranking_loss(predicted, actual), predicted)
    if actual.unique(dim=1).shape[1] > 1:
        assert share.item() == pytest.approx(reference.pair_accuracy(predicted, actual))


@pytest.mark.parametrize(("batch", "count"), [(7, 147), (2, 700)])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_ranking_loss_is_its_plain_twin_within_float32_rounding(batch: int, count: int, scale: float) -> None:
    """At the sizes of training, several blocks: closer to float64 than the plain form's own rounding allows."""
    generator = torch.Generator().manual_seed(count)
    predicted = (torch.randn(batch, count, generator=generator) * scale).requires_grad_()
    actual = torch.rand(batch, count, generator=generator).mul_(50).round_()
    exact = predicted.detach().double().requires_grad_()
    values = [loss.ranking_loss(predicted, actual), loss.ranking_loss_plain(predicted, actual)]
    truth = loss.ranking_loss_plain(exact, actual.double())
    (want,) = torch.autograd.grad(truth, exact)
    for value in values:
        (gradient,) = torch.autograd.grad(value * 3, predicted)
        torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=0)
        torch.testing.assert_close(gradient.double() / 3, want, rtol=1e-5, atol=3e-6 * want.abs().max().item())


def test_ranking_loss_keeps_nothing_of_the_size_of_all_pairs() -> None:
    """No operation gives more than a block, forward or backward; the plain form does."""
    predicted, actual = torch.randn(4, 600, requires_grad=True), torch.rand(4, 600)
    for function, limit in ((loss.ranking_loss, loss.BLOCK_ELEMENTS["cpu"]), (loss.pair_accuracy, 1 << 18)):
        with Largest() as largest:
            value = function(predicted, actual)
            if value.requires_grad:
                value.backward()
        assert 4 * 600 < largest.elements <= limit
    with Largest() as largest:
        loss.ranking_loss_plain(predicted, actual).backward()
    assert largest.elements == 4 * 600 * 600


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@settings(max_examples=40, deadline=None)
@given(seed=seeds, shape=shapes, ties=st.booleans(), standardize=st.booleans())
def test_absolute_loss_is_eq_4(seed: int, shape: tuple[int, int], ties: bool, standardize: bool) -> None:
    predicted, actual = scores(seed, shape, ties)
    fast = loss.absolute_loss(predicted, actual, standardize=standardize)
    check(fast, reference.absolute_loss(predicted, actual, standardize), predicted)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(2, 6)))
def test_patch_loss_is_eq_3(seed: int, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    check(loss.patch_loss(prediction, target).sum(), reference.patch_losses(prediction, target).sum(), prediction)
    absolute = sum(abs(a - b) for a, b in zip(prediction.flatten(), target.flatten(), strict=True)) / shape[2]
    check(loss.patch_loss(prediction, target, "l1").sum(), absolute, prediction)
    for fast, patch in zip(loss.pixel_target(target, True).flatten(0, 1), target.flatten(0, 1), strict=True):
        torch.testing.assert_close(fast, reference.normalised_patch(patch))


def test_difficulty_losses_send_no_gradient_to_the_actual_loss() -> None:
    predicted, actual = scores(0, (2, 5), ties=False)
    actual.requires_grad_()
    for value in (loss.ranking_loss(predicted, actual), loss.absolute_loss(predicted, actual)):
        assert torch.autograd.grad(value, actual, allow_unused=True, retain_graph=True)[0] is None


def test_ranking_loss_without_valid_pairs_is_zero_with_zero_gradient() -> None:
    predicted = torch.randn(2, 4, requires_grad=True)
    value = loss.ranking_loss(predicted, torch.ones(2, 4))
    value.backward()
    assert value.item() == 0
    assert predicted.grad is not None
    assert not predicted.grad.any()


def test_ranking_loss_keeps_the_gradient_of_badly_ordered_pairs() -> None:
    predicted = torch.tensor([[-40.0, 40.0]], requires_grad=True)
    loss.ranking_loss(predicted, torch.tensor([[1.0, 0.0]])).backward()
    torch.testing.assert_close(predicted.grad, torch.tensor([[-1.0, 1.0]]))


def test_difficulty_losses_compute_in_float32_from_bfloat16() -> None:
    predicted, actual = torch.randn(2, 5).bfloat16(), torch.rand(2, 5)
    assert loss.ranking_loss(predicted, actual).dtype == torch.float32
    torch.testing.assert_close(loss.ranking_loss(predicted, actual), loss.ranking_loss(predicted.float(), actual))


def test_many_blocks_lose_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,500 blocks of one row: the sum of float32's is as float64 has it, but for float32's last place."""
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 1)
    predicted, actual = (x.detach().float() for x in scores(0, (1, 1500), ties=False))
    truth = loss.ranking_loss_plain(predicted.double(), actual.double()).item()
    assert loss.ranking_loss(predicted, actual).item() == pytest.approx(truth, rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, shape=st.tuples(st.integers(1, 3), st.integers(2, 9)))
def test_predictor_health(seed: int, shape: tuple[int, int]) -> None:
    predicted, actual = scores(seed, shape, ties=False)
    assert loss.spearman(predicted, actual).item() == pytest.approx(reference.spearman(predicted, actual), abs=1e-5)
    assert loss.pair_accuracy(predicted, actual).item() == pytest.approx(reference.pair_accuracy(predicted, actual))


def test_of_few_patches_one_is_the_hardest() -> None:
    for count in (2, 3, 4):
        actual = torch.rand(5, count, generator=torch.Generator().manual_seed(count))
        assert loss.hardest_auc(actual, actual).item() == 1
        assert loss.hardest_auc(-actual, actual).item() == 0


def test_published_ties_and_saturation() -> None:
    """Pairs that the released form does not cap agree with it; capped ones are larger here, as they should be."""
    tensors = load_file(GOLDEN / "hpm_pixel.safetensors")
    predicted, actual = tensors["in/ties_loss_pred"].double(), tensors["in/ties_loss_target"].double()
    torch.testing.assert_close(loss.absolute_loss(predicted, actual), tensors["f64/ties/absolute"], rtol=1e-9, atol=0)
    exact, capped = loss.ranking_loss(predicted, actual), released_ranking_loss(predicted, actual)
    torch.testing.assert_close(capped, tensors["f64/ties/relative"], rtol=1e-9, atol=0)
    assert exact > capped


def released_ranking_loss(predicted: Tensor, actual: Tensor) -> Tensor:
    """The released form, with 1e-6 inside the logarithms, pair by pair."""
    terms = []
    for s, losses in zip(predicted, actual, strict=True):
        for i in range(len(s)):
            for j in range(len(s)):
                share = torch.sigmoid(s[i] - s[j])
                if losses[i] > losses[j]:
                    terms.append(-torch.log(share + 1e-6))
                if losses[i] < losses[j]:
                    terms.append(-torch.log(1 - share + 1e-6))
    return torch.stack(terms).mean()


# -------------------------------------------------------------------------------------------------- videos
def test_the_ranking_loss_of_a_video_stores_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 clips of 1,416 masked patches: no tensor of the forward or backward pass is near [B, M, M] in size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(
                [largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))]
            )
            return out

    predicted, actual = torch.randn(2, 1416, requires_grad=True), torch.rand(2, 1416)
    with Watch():
        loss.ranking_loss(predicted, actual).backward()
    assert largest <= loss.BLOCK_ELEMENTS["cpu"] < 2 * 1416**2 / 10


# -------------------------------------------------------------------------------------------------- features
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)))
def test_feature_loss_is_the_distance_of_directions(seed: int, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    fast, slow = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
    got, want = loss.feature_loss(fast, target), reference.feature_losses(slow, target)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    weights = torch.rand(shape[:2], generator=generator, dtype=torch.float64)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad, atol=1e-8, rtol=1e-8)


def test_feature_loss_is_float32_and_leaves_the_target_alone() -> None:
    target = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    prediction = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    value = loss.feature_loss(prediction, target)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert target.grad is None
    assert prediction.grad is not None


@pytest.mark.parametrize(
    ("prediction", "target", "want"),
    [
        ([3.0, 4.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [3.0, 4.0], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([2e-9, 0.0], [0.0, 3e-9], 2.0),  # small is not zero
        ([1.0, 1.0], [-2.0, -2.0], 4.0),
    ],
)
def test_feature_loss_of_no_direction(prediction: list[float], target: list[float], want: float) -> None:
    """The squared distance after `torch.nn.functional.normalize`, which leaves a vector of zeros at zero."""
    got = loss.feature_loss(torch.tensor([[prediction]]), torch.tensor([[target]]))
    torch.testing.assert_close(got, torch.tensor([[want]]))


# -------------------------------------------------------------------------------------------------- nodata
def some_valid(seed: int, shape: tuple[int, int], share: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < share


@settings(max_examples=40, deadline=None)
@given(seed=seeds, shape=shapes, ties=st.booleans(), share=st.sampled_from([0.0, 0.3, 0.8, 1.0]), blocks=st.booleans())
def test_patches_with_nodata_are_in_no_loss(
    seed: int, shape: tuple[int, int], ties: bool, share: float, blocks: bool
) -> None:
    predicted, actual = scores(seed, shape, ties)
    valid = some_valid(seed, shape, share)
    check(loss.valid_mean(predicted, valid), reference.valid_loss(predicted, valid), predicted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.BLOCK_ELEMENTS, "cpu", 5 if blocks else 1 << 18)
        ranking = loss.difficulty_loss("relative", predicted, actual, valid=valid)
    check(ranking, reference.valid_ranking_loss(predicted, actual, valid), predicted)
    plain = loss.ranking_loss_plain(predicted, loss.comparable(actual, valid))
    check(plain, reference.valid_ranking_loss(predicted, actual, valid), predicted)
    for standardize in (True, False):
        found = loss.difficulty_loss("absolute", predicted, actual, standardize=standardize, valid=valid)
        check(found, reference.valid_absolute_loss(predicted, actual, valid, standardize), predicted)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, shape=st.tuples(st.integers(1, 3), st.integers(2, 9)), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_health_is_that_of_the_patches_without_nodata(seed: int, shape: tuple[int, int], share: float) -> None:
    predicted, actual = (values.detach() for values in scores(seed, shape, False))
    valid = some_valid(seed, shape, share)
    rows = [
        (s[None], a[None])
        for s, a in zip(reference.valid_rows(predicted, valid), reference.valid_rows(actual, valid), strict=True)
        if len(s) > 1
    ]
    found = loss.health(predicted, actual, -actual, valid).tolist()
    if not rows:
        assert found == [0, 0, 0]
        assert loss.hardest_auc(predicted, actual, valid=valid) == 0
        return
    mean = sum(reference.spearman(s, a) for s, a in rows) / len(rows)
    pairs = [len(s[0]) * (len(s[0]) - 1) for s, _ in rows]
    order = sum(reference.pair_accuracy(s, a) * n for (s, a), n in zip(rows, pairs, strict=True)) / sum(pairs)
    assert found == pytest.approx([mean, order, -1], abs=1e-5)
    auc = sum(loss.hardest_auc(s, a).item() for s, a in rows) / len(rows)
    assert loss.hardest_auc(predicted, actual, valid=valid).item() == pytest.approx(auc, abs=1e-6)
    whole = torch.ones_like(valid)
    torch.testing.assert_close(loss.health(predicted, actual, -actual, whole), loss.health(predicted, actual, -actual))
