"""BEiT's pretraining checkpoints: what the run computes is what plain loops over their names compute."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from fasthpm.layers import relative_index
from fasthpm.mask import split_ids
from tests.helpers.published import published, run_import

TOKENS, SIDE, WIDTH, HEADS = 11, 3, 128, 4


def beits(*, relative: bool = False, gammas: bool = False) -> dict[str, Tensor]:
    """Random weights under BEiT's names: separate biases of queries and values, a head of tokens."""
    state = {k: v for k, v in published(predictor=False).items() if not k.startswith("decoder_")}
    torch.manual_seed(5)
    state["mask_token"], state["pos_embed"] = torch.randn(1, 1, WIDTH), torch.randn(1, 1 + SIDE**2, WIDTH)
    state |= {"lm_head.weight": torch.randn(TOKENS, WIDTH), "lm_head.bias": torch.randn(TOKENS)}
    for key in [key for key in state if key.endswith("qkv.bias")]:
        query, _, value = state.pop(key).chunk(3)
        stem = key.removesuffix("qkv.bias")
        state |= {f"{stem}q_bias": query.clone(), f"{stem}v_bias": value.clone()}
        if gammas:
            block = stem.removesuffix("attn.")
            state |= {f"{block}gamma_1": torch.rand(WIDTH), f"{block}gamma_2": torch.rand(WIDTH)}
    if relative:
        del state["pos_embed"]
        state["rel_pos_bias.relative_position_bias_table"] = torch.randn((2 * SIDE - 1) ** 2 + 3, HEADS)
        state["rel_pos_bias.relative_position_index"] = relative_index(SIDE, SIDE)
    return state


def slow(state: dict[str, Tensor], images: Tensor, mask: Tensor) -> Tensor:
    """Logits of all places, [B, L, K]: BEiT's forward pass, one head at a time."""
    state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    x = torch.nn.functional.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=4).flatten(2).transpose(1, 2)
    x = torch.where(mask[:, :, None], state["mask_token"], x)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state.get("pos_embed", 0)
    for number in range(4):
        block, normed = f"blocks.{number}", norm(x, f"blocks.{number}.norm1")
        weights = state[f"{block}.attn.qkv.weight"].chunk(3)
        query, value = (normed @ weights[k].T + state[f"{block}.attn.{n}_bias"] for k, n in ((0, "q"), (2, "v")))
        key, heads = normed @ weights[1].T, []
        for head in range(HEADS):
            part = slice(32 * head, 32 * head + 32)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / 32**0.5
            if "rel_pos_bias.relative_position_bias_table" in state:
                index = state["rel_pos_bias.relative_position_index"]
                scores = scores + state["rel_pos_bias.relative_position_bias_table"][index, head]
            heads.append(scores.softmax(dim=-1) @ value[..., part])
        one = torch.ones(WIDTH, dtype=torch.float64)
        x = x + state.get(f"{block}.gamma_1", one) * linear(torch.cat(heads, dim=-1), f"{block}.attn.proj")
        hidden = torch.nn.functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + state.get(f"{block}.gamma_2", one) * linear(hidden, f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 1:], "lm_head")


@torch.no_grad()
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("gammas", [False, True])
def test_the_run_computes_what_beit_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], relative: bool, gammas: bool
) -> None:
    state = beits(relative=relative, gammas=gammas)
    torch.save({"model": state, "epoch": 799}, tmp_path / "beit.pth")
    run_import(tmp_path / "beit.pth", tmp_path / "run")
    model, recipe = load_weights(tmp_path / "run")
    images, mask = torch.randn(2, 3, 12, 12, dtype=torch.float64), torch.rand(2, 9).argsort(dim=1) < 4
    got = model.double()(images, mask, target=torch.zeros(2, 9, dtype=torch.int64)).reconstruction
    places = split_ids(mask, 4)[1]
    want = slow(state, images, mask).gather(1, places[:, :, None].expand(-1, -1, TOKENS))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert (recipe.model, recipe.target, recipe.target_dim) == ("beit_vit_nano_patch4_28", "tokens", TOKENS)
    assert recipe.positions == ("relative" if relative else "learned")
    assert bool(recipe.layer_scale) == gammas
    assert "beit checkpoint" in capsys.readouterr().out


def test_positions_of_every_block_are_refused_by_name(tmp_path: Path) -> None:
    """As BEiT's fine-tuned models have them."""
    state = beits()
    state["blocks.0.attn.relative_position_bias_table"] = torch.zeros(28, HEADS)
    torch.save({"model": state}, tmp_path / "beit.pth")
    with pytest.raises(UserError, match=r"unexpected .*relative_position_bias_table.*it has the names of BEiT"):
        run_import(tmp_path / "beit.pth", tmp_path / "run")
    assert not (tmp_path / "run").exists()
