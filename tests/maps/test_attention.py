"""Attention as a map: weights of the cls token, scaled."""

from typing import Any

import pytest
import torch

from fasthpm.layers import attend_plain
from fasthpm.maps import attention as maps_attention
from fasthpm.model import create_model


def test_attention_is_the_last_blocks_of_the_cls_token() -> None:
    model = create_model("hpm_vit_nano_patch4_28", in_chans=1).eval()
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        got = maps_attention.cls_attention(model, images)
        tokens = model.patch_embed(model.patchify(images)) + model.pos_embed[:, 1:]
        tokens = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(3, -1, -1), tokens], 1)
        for block in model.blocks[:-1]:
            tokens = block(tokens)
        last: Any = model.blocks[-1]
        qkv = last.attn.qkv(last.norm1(tokens)).reshape(3, 50, 3, 4, 32).permute(2, 0, 3, 1, 4)
        eye = torch.eye(50).expand(3, 4, 50, 50)
        want = attend_plain(qkv[0], qkv[1], eye)[:, :, 0, 1:]
        assert maps_attention.attention_weights(maps_attention.cls_attention(model, images[:0])).shape == (
            0,
            49,
        )  # a rank without samples
    torch.testing.assert_close(got, want)
    assert not last.attn.qkv._forward_hooks


def test_relative_positions_are_part_of_the_attention() -> None:
    model = create_model("beit_vit_nano_patch4_28", in_chans=1, positions="relative", layer_scale=0.1).eval()
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        model.rel_pos_bias.relative_position_bias_table.normal_(std=2)
        got = maps_attention.cls_attention(model, images)
        tokens = model.patch_embed(model.patchify(images))
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], 1)
        bias = model.rel_pos_bias()
        for block in model.blocks[:-1]:
            tokens = block(tokens, bias=bias)
        last: Any = model.blocks[-1]
        qkv = last.attn.qkv(last.norm1(tokens)).reshape(2, 50, 3, 4, 32).permute(2, 0, 3, 1, 4)
        want = attend_plain(qkv[0], qkv[1], torch.eye(50).expand(2, 4, 50, 50), bias)[:, :, 0, 1:]
    torch.testing.assert_close(got, want)


def test_weights_are_scaled_after_the_mean_or_before_it() -> None:
    attention = torch.tensor([[[0.1, 0.2, 0.5], [0.3, 0.1, 0.1]]])
    torch.testing.assert_close(maps_attention.attention_weights(attention), torch.tensor([[0.05 / 0.15, 0.0, 1.0]]))
    released = maps_attention.attention_weights(attention, per_head=True)
    torch.testing.assert_close(released, torch.tensor([[0.5, 0.125, 0.5]]))
    assert maps_attention.attention_weights(torch.full((1, 2, 4), 0.25)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("ulps", [0, 1, 4])
@pytest.mark.parametrize("level", [1.0, 1 / 197, 1e-6, -3.0, 0.0])
def test_rounding_is_no_difference(level: float, ulps: int) -> None:
    """Else patches of a constant map would be masked for ever by their last bit."""
    values = torch.full((2, 3, 50), level)
    for _ in range(ulps):
        values[:, :, ::7] = values[:, :, ::7].nextafter(torch.tensor(torch.inf))
    values[1, :, 5] += 0.01  # the other image has something to tell
    for per_head in (False, True):
        weights = maps_attention.attention_weights(values, per_head=per_head)
        assert weights[0].tolist() == [0.0] * 50
        assert weights[1].argmax() == 5
        assert weights[1, 5] == 1
    apart = maps_attention.standardized(values[:, 0])
    assert apart[0].tolist() == [0.0] * 50
    torch.testing.assert_close(apart[1].std(), torch.tensor(1.0))
    assert maps_attention.standardized(torch.tensor([[torch.nan, 1.0]])).isnan().all()
