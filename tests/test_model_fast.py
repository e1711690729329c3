"""Fast modes of the model, each against its slow twin: values and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasthpm import loss
from fasthpm.mask import random_mask, split_ids
from tests.helpers import reference
from tests.helpers.fast_modes import MODES, doubled


def gradients(value: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def assert_alike(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert set(one) == set(two)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], rtol=1e-8, atol=1e-10, msg=f"gradient of {name}")


@pytest.mark.parametrize("mode", ["cross", "both"])
def test_cross_attention_decoders_are_self_attention_that_sees_the_context_alone(mode: str) -> None:
    """A whole forward: blocks of plain attention on all tokens, of which only mask tokens change."""
    model = doubled(decoder_depth=2, **MODES[mode])
    images, mask = torch.randn(2, 1, 28, 28, dtype=torch.float64), random_mask(torch.rand(2, 49), 0.75)
    fast = model(images, mask)

    def slow_run(blocks: Any, tokens: Tensor, last: int) -> Tensor:
        context, asking = tokens[:, :-last], tokens[:, -last:]
        for block in blocks:
            asking = torch.stack([reference_block(block, a, c) for a, c in zip(asking, context, strict=True)])
        return asking

    def reference_block(block: Any, asking: Tensor, context: Tensor) -> Tensor:
        everything = block.norm1(torch.cat([context, asking]))
        query, key, value = F.linear(everything, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=1)
        hidden = torch.ones(len(everything), len(everything), dtype=torch.bool)
        hidden[:, : len(context)] = False
        out = []
        for head in range(block.attn.num_heads):
            size = query.shape[1] // block.attn.num_heads
            part = slice(head * size, (head + 1) * size)
            scores = (query[:, part] @ key[:, part].T / size**0.5).masked_fill(hidden, -torch.inf)
            out.append(scores.softmax(dim=1) @ value[:, part])
        asking = asking + block.attn.proj(torch.cat(out, dim=1))[len(context) :]
        return asking + block.mlp(block.norm2(asking))

    patches = model.patchify(images)
    visible, masked = split_ids(mask, 37)
    tokens = model._tokens(patches, visible, masked)
    trunk = slow_run(model.decoder_blocks, tokens, 37)
    reconstruction = model.decoder_pred(model.decoder_norm(trunk))
    per_patch = loss.patch_loss(reconstruction, patches.gather(1, masked[:, :, None].expand(-1, -1, 16)))
    read = trunk if mode == "both" else slow_run(model.decoder_blocks_losspred, tokens, 37)
    predicted = model.decoder_pred_losspred(model.decoder_norm_losspred(read))
    slow = per_patch.mean() + loss.ranking_loss_plain(predicted, per_patch)
    torch.testing.assert_close(fast.loss, slow)
    torch.testing.assert_close(fast.predicted_difficulty, predicted)
    assert_alike(gradients(fast.loss, model), gradients(slow, model))


def test_a_shared_predictor_is_a_norm_and_a_line_on_the_reconstructor() -> None:
    model = doubled(predictor="shared")
    images, mask = torch.randn(1, 1, 28, 28, dtype=torch.float64), random_mask(torch.rand(1, 49), 0.75)
    trunk: list[Tensor] = []
    model.decoder_norm.register_forward_pre_hook(lambda module, inputs: trunk.append(inputs[0]))
    fast = model(images, mask).predicted_difficulty[0]
    head = model.decoder_pred_losspred
    rows = [reference.layer_norm(row, model.decoder_norm_losspred) for row in trunk[0][0]]
    slow = torch.stack([(row * head.weight[0]).sum() + head.bias[0] for row in rows])
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(slow)
    assert_alike(gradients((fast * weight).sum(), model), gradients((slow * weight).sum(), model))
    assert not list(model.decoder_blocks_losspred)


def test_cross_decoders_take_the_weights_of_usual_ones() -> None:
    usual, cross = doubled(), doubled(decoder_attention="cross")
    cross.load_state_dict(usual.state_dict())
    images = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(cross.encode(images), usual.encode(images))


def test_a_smaller_teacher_image_is_a_smaller_image() -> None:
    """Twin: a model of half the grid, with averaged positions, on averaged pixels; its map enlarged cell by cell."""
    model = doubled(input_size="32")
    small = doubled(input_size="16")
    state = {k: v for k, v in model.state_dict().items() if "pos_embed" not in k}
    for name in ("pos_embed", "decoder_pos_embed"):
        table = model.state_dict()[name][0]
        cells = [
            sum(table[1 + 8 * (2 * r + i) + 2 * c + j] for i in (0, 1) for j in (0, 1)) / 4
            for r in range(4)
            for c in range(4)
        ]
        state[name] = torch.stack([table[0], *cells])[None]
    small.load_state_dict(state)
    images = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    averaged = (images[..., ::2, ::2] + images[..., 1::2, ::2] + images[..., ::2, 1::2] + images[..., 1::2, 1::2]) / 4
    fast, maps = model.predict_loss(images, 2), small.predict_loss(averaged).reshape(2, 4, 4)
    for row in range(8):
        for column in range(8):
            y, x = (min(max((place + 0.5) / 2 - 0.5, 0), 3) for place in (row, column))
            i, j = int(y), int(x)
            k, m = min(i + 1, 3), min(j + 1, 3)
            upper = maps[:, i, j] * (1 - (x - j)) + maps[:, i, m] * (x - j)
            lower = maps[:, k, j] * (1 - (x - j)) + maps[:, k, m] * (x - j)
            torch.testing.assert_close(fast[:, row * 8 + column], upper * (1 - (y - i)) + lower * (y - i))
