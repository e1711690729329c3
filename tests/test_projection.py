"""The projection head: centres without logits, distributions and losses against the plain form."""

import pytest
import torch
from torch import nn

from fasthpm.projection import Centres, ProjectionHead, cross_entropy, entropy, mean_logits, sharpened, teacher_logits
from tests.helpers import reference_views as reference

K = 24


def head(free_norm: bool = False) -> ProjectionHead:
    torch.manual_seed(0)
    made = ProjectionHead(16, K, 32, free_norm)
    if made.last_layer.weight_g is not None:
        nn.init.uniform_(made.last_layer.weight_g, 0.5, 2)
    return made


def test_the_head_is_the_published_one() -> None:
    made, tokens = head(), torch.randn(3, 5, 16)
    state = made.state_dict()
    assert [*state] == [
        *(f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
        "last_layer.weight_v",
    ]
    hidden = tokens
    for layer in (0, 2, 4):
        hidden = hidden @ state[f"mlp.{layer}.weight"].T + state[f"mlp.{layer}.bias"]
        hidden = nn.functional.gelu(hidden) if layer < 4 else hidden
    hidden = hidden / hidden.norm(dim=-1, keepdim=True)
    rows = state["last_layer.weight_v"]
    wanted = hidden @ (rows / rows.norm(dim=1, keepdim=True)).T
    assert torch.allclose(made(tokens), wanted, atol=1e-6)


@pytest.mark.parametrize("free_norm", [False, True])
def test_mean_logits_are_those_of_all_logits(free_norm: bool) -> None:
    made, tokens = head(free_norm), torch.randn(6, 10, 16)
    entering = made.bottleneck(tokens)
    logits = made(tokens)
    wanted = torch.stack([logits[:, 0].mean(0), logits[:, 1:].mean((0, 1))])
    assert torch.allclose(mean_logits(made, entering), wanted, atol=1e-6)
    assert teacher_logits(made.bfloat16(), entering.bfloat16()).dtype == torch.float32


def test_centres_move_once_per_update_however_it_is_cut() -> None:
    whole, cut = Centres(K, 0.9), Centres(K, 0.9)
    for _ in range(3):
        means = torch.randn(4, 2, K)
        whole.add(means.mean(0))
        whole.update()
        for part in means:
            cut.add(part)
        cut.update()
    assert torch.allclose(whole.values, cut.values, atol=1e-6)


def test_centres_are_a_moving_average_and_forget_what_is_dropped() -> None:
    centres, wanted = Centres(K, 0.9), torch.zeros(2, K)
    place = centres.values.data_ptr()
    for number in range(4):
        means = torch.randn(2, K)
        centres.add(torch.full((2, K), torch.nan) if number == 2 else means)
        if number == 2:
            centres.forget()
            continue
        centres.update()
        wanted = 0.9 * wanted + 0.1 * means
    assert torch.allclose(centres.values, wanted, atol=1e-6)
    assert centres.values.data_ptr() == place


def test_loss_and_gradient_are_the_plain_ones() -> None:
    students, teachers = torch.randn(7, K, dtype=torch.float64), torch.randn(7, K, dtype=torch.float64)
    centre = torch.randn(K, dtype=torch.float64)
    grads = []
    for plain in (False, True):
        leaf = students.clone().requires_grad_()
        if plain:
            wanted = [reference.softmax((row - centre) / 0.07) for row in teachers]
            loss = torch.stack([reference.cross_entropy(a, b) for a, b in zip(leaf, wanted, strict=True)])
        else:
            loss = cross_entropy(leaf, sharpened(teachers, centre, 0.07))
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        grads.append((loss.detach(), grad))
    assert torch.allclose(grads[0][0], grads[1][0])
    assert torch.allclose(grads[0][1], grads[1][1])


def test_entropy_is_none_of_a_peak_and_the_most_of_a_uniform_one() -> None:
    peak, even = torch.eye(K)[0], torch.full((K,), 1 / K)
    assert float(entropy(peak)) == 0
    assert float(entropy(even)) == pytest.approx(float(torch.tensor(float(K)).log()))
