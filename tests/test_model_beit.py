"""BEiT's form of the model against timm's Beit: positions, LayerScale, drop path, initial values."""

import dataclasses
import math
from typing import Any

import pytest
import timm.models.beit
import torch
from torch import Tensor, nn

from fasthpm.errors import UserError
from fasthpm.layers import path_factors
from fasthpm.mask import split_ids
from fasthpm.model import HPMViT, create_model
from fasthpm.objectives import TOKENS
from fasthpm.ranks.engine import parameter_groups
from fasthpm.recipe import Recipe
from tests.helpers.steps import ALPHA, batch, step_of
from tests.helpers.tokens import Brightness

SMALL: dict[str, Any] = {
    "img_size": (12, 16),
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "predict_loss": "none",
    "encoder_mask_tokens": True,
    "init": "beit",
    "objective": TOKENS.as_wide_as(7),
}
POSITIONS = ["learned", "relative"]


def beit(positions: str, layer_scale: float = 0.1) -> HPMViT:
    """A small model in float64, none of whose weights is at a value that hides a mistake."""
    torch.manual_seed(0)
    model = HPMViT(**SMALL, positions=positions, layer_scale=layer_scale).double()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    for block in model.blocks:  # timm's has none, and softmax ignores it
        block.attn.qkv.bias.data[16:32] = 0  # type: ignore[union-attr, operator, index]
    return model


def timms(model: HPMViT) -> Any:
    """timm's Beit with the weights of our encoder."""
    theirs = timm.models.beit.Beit(
        img_size=model.img_size,
        patch_size=4,
        in_chans=1,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=0,
        global_pool="token",
        init_values=model.layer_scale or None,
        use_abs_pos_emb=model.positions == "learned",
        use_shared_rel_pos_bias=model.positions == "relative",
    ).double()
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("attn.qkv.bias"):
            state[key.replace("qkv.bias", "q_bias")], state[key.replace("qkv.bias", "v_bias")] = value[:16], value[32:]
        elif not key.startswith(("decoder_", "mask_token")):
            state[key] = value
    theirs.load_state_dict(state)
    return theirs.eval()


def slow(model: HPMViT, theirs: Any, images: Tensor, mask: Tensor | None, paths: Tensor | None = None) -> Tensor:
    """timm's blocks on all places in raster order, masked ones the mask token; `paths`: [B, 2 * depth]."""
    tokens = theirs.patch_embed(images)
    if mask is not None:
        tokens = torch.where(mask[:, :, None], model.mask_token, tokens)
    tokens = torch.cat([theirs.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    if theirs.pos_embed is not None:
        tokens = tokens + theirs.pos_embed
    bias = theirs.rel_pos_bias() if theirs.rel_pos_bias is not None else None
    for number, block in enumerate(theirs.blocks):
        for half in (0, 1):
            if half:
                branch = block.mlp(block.norm2(tokens))
            else:
                branch = block.attn(block.norm1(tokens), shared_rel_pos_bias=bias)
            gamma = (block.gamma_1, block.gamma_2)[half]
            branch = branch if gamma is None else gamma * branch
            factor = 1.0 if paths is None else paths[:, 2 * number + half].double()[:, None, None]
            tokens = tokens + factor * branch
    out: Tensor = theirs.norm(tokens)
    return out


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_encoder_is_timms_beit(positions: str, layer_scale: float) -> None:
    model = beit(positions, layer_scale)
    images = torch.randn(2, 1, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(model.encode(images), timms(model).forward_features(images))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_masked_tokens_and_left_out_branches_are_timms(positions: str, again: bool) -> None:
    """Values and gradients of the head at masked places, the same branches left out in both."""
    model = beit(positions)
    model.activation_checkpointing = again
    theirs = timms(model)
    images, mask = torch.randn(2, 1, 12, 16, dtype=torch.float64), torch.rand(2, 12).argsort(dim=1) < 5
    paths = path_factors(torch.rand(2, 6), 0.9)
    assert 0 < int((paths == 0).sum()) < 12
    output = model(images, mask, target=torch.zeros(2, 12, dtype=torch.int64), paths=paths)
    places = 1 + split_ids(mask, 5)[1]
    hidden = slow(model, theirs, images, mask, paths)
    chosen = hidden.gather(1, places[:, :, None].expand(-1, -1, 16))
    want = chosen @ model.decoder_pred.weight.detach().T + model.decoder_pred.bias.detach()
    torch.testing.assert_close(output.reconstruction, want)
    weights = torch.randn_like(want)
    (output.reconstruction * weights).sum().backward()
    (want * weights).sum().backward()
    for name, weight in theirs.named_parameters():
        own = dict(model.named_parameters()).get(name)
        if own is not None and own.grad is not None and weight.grad is not None:
            torch.testing.assert_close(own.grad, weight.grad, msg=name)
    assert model.blocks[0].mlp.fc1.weight.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_other_paths_see_the_same_encoder(positions: str) -> None:
    """What `encode` gives of visible patches, and the looks that measure losses, are those of the forward pass."""
    model = beit(positions).eval()
    images, mask = torch.randn(2, 1, 12, 16, dtype=torch.float64), torch.rand(2, 12).argsort(dim=1) < 5
    visible, masked = split_ids(mask, 5)
    want = slow(model, timms(model), images, mask)
    order = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + visible], dim=1)
    torch.testing.assert_close(model.encode(images, mask), want.gather(1, order[:, :, None].expand(-1, -1, 16)))
    ids = torch.randint(0, 7, (2, 12))
    losses = model.reconstruction_losses(model.patchify(images), visible, masked, ids)
    torch.testing.assert_close(losses, model(images, mask, target=ids).per_patch_loss)


def test_left_out_branches_keep_the_mean() -> None:
    """Shares of left-out branches rise linearly to the rate, those that stay are so much larger."""
    factors = path_factors(torch.rand(20000, 6, generator=torch.Generator().manual_seed(0)), 0.4)
    rates = torch.tensor([0.0, 0.0, 0.2, 0.2, 0.4, 0.4])
    torch.testing.assert_close((factors == 0).float().mean(0), rates, atol=0.02, rtol=0)
    torch.testing.assert_close(factors.mean(0), torch.ones(6), atol=0.03, rtol=0)
    assert torch.equal(path_factors(torch.rand(3, 2), 0.0), torch.ones(3, 2))


def test_branches_are_of_seed_update_and_sample_and_of_the_student_alone() -> None:
    step = step_of(model="beit_vit_nano_patch4_28", target="tokens", target_dim=4, predict_loss="none", drop_path=0.5,
                   difficulty="in_place")  # fmt: skip
    step.attach_frozen(Brightness(4, 4))
    images, ids = batch()
    whole = step._paths(ids, torch.tensor(3))
    assert whole is not None
    assert torch.equal(whole, torch.cat([step._paths(part, torch.tensor(3)) for part in ids.split(2)]))  # type: ignore[misc]
    assert not torch.equal(whole, step._paths(ids, torch.tensor(4)))  # type: ignore[arg-type]
    first, second = (float(step(images, ids, torch.tensor(3), ALPHA).loss.detach()) for _ in range(2))
    assert first == second
    step.recipe = dataclasses.replace(step.recipe, drop_path=0.0)
    other = step(images, ids, torch.tensor(3), ALPHA)
    assert float(other.loss.detach()) != first
    assert step._paths(ids, torch.tensor(3)) is None


# -------------------------------------------------------------------------------------------------- initial values
def test_initial_values_are_beits() -> None:
    model = create_model(
        "beit_vit_tiny_patch4_28", positions="learned", layer_scale=0.1, objective=TOKENS.as_wide_as(50)
    )
    assert (model.encoder_mask_tokens, model.predict_loss_kind) == (True, "none")
    limit = 0.02
    for name, weight in model.requires_grad_(False).named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "gamma" in name:
            assert torch.equal(weight, torch.full_like(weight, 0.1))
        elif "norm" not in name:
            assert float(weight.abs().max()) <= limit + 1e-6, name
    # Of a normal deviate cut off at one deviation, the deviation is 0.54.
    spread = 0.02 * 0.5396
    for layer in (1, 12):
        block = model.blocks[layer - 1]
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):  # type: ignore[union-attr]
            assert float(weight.std()) == pytest.approx(spread / math.sqrt(2 * layer), rel=0.03)
        assert float(block.attn.qkv.weight.std()) == pytest.approx(spread, rel=0.03)  # type: ignore[union-attr, arg-type, operator]


def test_positions_and_scales_do_not_decay() -> None:
    model = beit("learned")
    groups = {group["name"]: group["params"] for group in parameter_groups(model, 0.05)}
    kept = {id(weight) for weight in groups["no_decay"]}
    assert {id(model.pos_embed), id(model.cls_token), id(model.blocks[0].gamma_1)} <= kept  # type: ignore[union-attr]
    assert id(model.decoder_pred.weight) not in kept


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"positions": "relative"}, "positions relative need an encoder that sees all places, and hpm_vit_nano"),
        ({"positions": "relativ"}, "expected one of sincos, learned, relative; did you mean"),
        ({"positions": "learned", "num_frames": 16, "tubelet_size": 2, "model": "hpm_vit_nano_patch8_32_video",
          "input_size": "32", "patch_size": 8}, "positions learned are of images"),
        ({"positions": "relative", "model": "beit_vit_nano_patch4_28", "mask_policy": "attention"}, "mask_policy is"),
        ({"drop_path": 1.0}, "drop_path is 1.0, expected"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], problem: str) -> None:
    nano = {"model": "hpm_vit_nano_patch4_28", "input_size": "28", "patch_size": 4, "predict_loss": "none"}
    with pytest.raises(UserError, match=problem) as caught:
        Recipe(**{**nano, "mask_policy": "random", **changes})
    assert "\n" not in str(caught.value)
