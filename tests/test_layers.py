"""Positions and attention against their equations and plain twins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fasthpm.layers import CrossBlock, attend, attend_plain, sincos_positions, sinusoid_positions
from tests.helpers import reference
from tests.helpers.golden import GOLDEN


def test_published_positions() -> None:
    tensors = load_file(GOLDEN / "posembed_224.safetensors")
    for name, dim in (("pos_embed", 768), ("decoder_pos_embed", 512)):
        table = sincos_positions(dim, (14, 14))
        torch.testing.assert_close(table[tensors["rows"].long()], tensors[f"{name}_rows"], rtol=0, atol=1e-6)
        torch.testing.assert_close(table.double().sum(1), tensors[f"{name}_rowsum_f64"], rtol=0, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), quarter=st.integers(1, 4))
def test_positions_are_a_true_rectangular_grid(rows: int, columns: int, quarter: int) -> None:
    want = reference.sincos(4 * quarter, rows, columns).float()
    torch.testing.assert_close(sincos_positions(4 * quarter, (rows, columns)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_plain_twin_agree(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    upstream = torch.randn(2, 3, 7, 8)
    results = []
    for function in (attend, attend_plain, torch.nn.functional.scaled_dot_product_attention):
        out = function(*(x.to(dtype) for x in (query, key, value)))
        results.append((out, *torch.autograd.grad((out.float() * upstream).sum(), (query, key, value))))
    limits = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, **limits)


@settings(max_examples=10, deadline=None)
@given(dim=st.integers(1, 9), count=st.integers(1, 9))
def test_positions_are_the_loop(dim: int, count: int) -> None:
    torch.testing.assert_close(sinusoid_positions(dim, count), reference.sinusoid(dim, count).float())


def test_a_cross_block_is_its_equations() -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, 2, 4.0).double()
    tokens, context = (torch.randn(1, n, 8, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    fast, slow = block(tokens, context)[0], reference.cross_block(tokens[0], context[0], block)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(fast)
    given = [tokens, context, *block.parameters()]
    ours = torch.autograd.grad((fast * weight).sum(), given)
    theirs = torch.autograd.grad((slow * weight).sum(), given)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)
