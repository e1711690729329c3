"""The baseline of `bench.beit` computes what our model computes."""

import itertools
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import beit
from fasthpm.mask import split_ids
from fasthpm.patches import model_of

ARGUMENTS = Namespace(size="nano", batch_size=2, tokens=7)


@torch.no_grad()
def test_the_eager_beit_is_ours() -> None:
    recipe = beit.recipe_of("beit", ARGUMENTS, "zero0_fp32")
    model = model_of(recipe)
    theirs = beit.EagerBEiT(model, 7)
    state = model.state_dict()
    names = {"decoder_pred.": "head.", "patch_embed.proj.": "patch_embed.", "mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.2."}
    moved = {}
    for key, value in state.items():
        for ours, other in names.items():
            key = key.replace(ours, other)
        moved[key] = value
    theirs.load_state_dict(moved)
    images, mask = torch.randn(2, 3, 28, 28), torch.rand(2, 49).argsort(dim=1) < 19
    want = model(images, mask, target=torch.zeros(2, 49, dtype=torch.int64)).reconstruction
    with FlopCounterMode(display=False) as counter:
        got = theirs(images, mask).unflatten(0, (2, 19))
    book = beit.codebook(recipe)
    counted = beit.eager_flops(model, recipe, book) - book.flops(49)  # a backward pass counts twice
    assert 3 * counter.get_total_flops() / 2 == pytest.approx(counted)
    assert split_ids(mask, 19)[1].shape == (2, 19)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_every_variant_is_a_recipe() -> None:
    for name in beit.VARIANTS:
        recipe = beit.recipe_of(name, ARGUMENTS, "zero0_fp32")
        assert recipe.num_masked == 19
        assert recipe.uses_teacher == (name != "beit")


def test_products_are_told_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which every operation takes a second; ours, and the eager one, count what they are made of."""
    ticks = itertools.count()
    monkeypatch.setattr("bench.beit.time.thread_time", lambda: float(next(ticks)))
    square = torch.ones(1, 4, 4)

    def update(number: int) -> None:
        square.add(1)
        torch.mm(square[0], square[0])
        F.scaled_dot_product_attention(square[None], square[None], square[None])

    with torch.no_grad():
        found = beit.product_seconds({"toy": update}, 3)["toy"]
    assert found["products"] == 2  # the product and the attention
    assert found["others"] >= 1
    result = {
        "median_seconds": {"beit": 3.0, "eager_beit": 4.0},
        "gflops_per_image": {"beit": 1.0, "eager_beit": 1.5},
        "ratios": {},
        "product_seconds": {"beit": {"products": 2.0, "others": 1.0}, "eager_beit": {"products": 2.5, "others": 1.5}},
    }
    assert "| beit | 2.00 | 1.00 | 67 | 2.00 |" in beit.report(result)
