"""The classifier: the encoder with a head, and its layers' scales, against timm and MAE's figures."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasthpm.errors import UserError
from fasthpm.layers import sincos_positions
from fasthpm.model import create_model
from fasthpm.probes import classifier
from fasthpm.probes.classifier import build_classifier, resize_positions, resize_slots
from tests.helpers.golden import SCHEDULES
from tests.helpers.reference import layer_normalised_pool, sinusoid
from tests.helpers.videos import small


# -------------------------------------------------------------------------------------------------- published figures
@pytest.mark.parametrize("decay", ["0.65", "0.75"])
def test_layer_decay_is_maes(decay: str) -> None:
    expected = SCHEDULES["layer_decay_vit_base"][decay]
    scales = [classifier.layer_scale(f"blocks.{i}.x", 2, 12, float(decay), 0.05)[0] for i in range(12)]
    ends = [classifier.layer_scale(name, 2, 12, float(decay), 0.05)[0] for name in ("pos_embed", "head.weight")]
    assert [ends[0], *scales, ends[1]] == pytest.approx(expected["scales_by_layer_id"], rel=1e-12)
    for group in expected["groups"]:
        for name in group.get("names", [group.get("first")]):
            ndim = 3 if name in ("cls_token", "pos_embed") else 1 if name.endswith("bias") or "norm" in name else 2
            scale, weight_decay = classifier.layer_scale(name, ndim, 12, float(decay), 0.05)
            assert scale == pytest.approx(group["lr_scale"], rel=1e-12)
            assert weight_decay == group["weight_decay"], name


def test_groups_hold_every_parameter_once() -> None:
    vit = classifier.build_classifier(create_model("hpm_vit_nano_patch4_28", in_chans=1), 5, image_size=(28, 28))
    groups = classifier.layer_decay_groups(vit, 0.5, 0.05)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in vit.parameters())
    assert {group["lr_scale"] for group in groups} == {0.5**i for i in range(6)}
    assert sorted(g["weight_decay"] for g in groups if g["lr_scale"] == 1) == [0.0, 0.05]


# -------------------------------------------------------------------------------------------------- timm's ViT
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_logits_are_the_encoders(pool: str) -> None:
    """timm's ViT against our own encoder with pooling, norm and head spelled out, in float64."""
    model = create_model("hpm_vit_nano_patch4_28", in_chans=1).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    vit = classifier.build_classifier(model, 7, image_size=(28, 28), global_pool=pool).double().eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.startswith(("head", "fc_norm")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for name in ("cls_token", "norm.weight", "blocks.0.mlp.fc1.weight"):  # build_classifier rounds to float32
        if name in dict(vit.named_parameters()):
            torch.testing.assert_close(vit.get_parameter(name).float(), model.get_parameter(name).float())
    vit.load_state_dict({k: v for k, v in model.state_dict().items() if k in vit.state_dict()}, strict=False)
    images = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    if pool == "token":
        expected = vit.head(model.encode(images)[:, 0])
    else:
        norm, model.norm = model.norm, nn.Identity()  # type: ignore[assignment]
        expected = vit.head(layer_normalised_pool(model.encode(images)[:, 1:], vit.fc_norm.weight, vit.fc_norm.bias))
        model.norm = norm
    torch.testing.assert_close(vit(images), expected, rtol=1e-9, atol=1e-9)


def test_positions_follow_the_picture_to_other_sizes_and_rectangles() -> None:
    table = sincos_positions(32, (4, 6))[None]
    assert torch.equal(classifier.resize_positions(table, (4, 6), (4, 6)), table)
    resized = classifier.resize_positions(table, (4, 6), (8, 3))
    grid = table[:, 1:].reshape(1, 4, 6, 32).permute(0, 3, 1, 2)
    plain = F.interpolate(grid, size=(8, 3), mode="bicubic", align_corners=False)
    assert torch.equal(resized[:, 0], table[:, 0])
    torch.testing.assert_close(resized[:, 1:], plain.permute(0, 2, 3, 1).reshape(1, 24, 32))
    model = create_model("hpm_vit_nano_patch4_28", in_chans=1)
    vit = classifier.build_classifier(model, 3, image_size=(36, 20))
    assert vit(torch.randn(2, 1, 36, 20)).shape == (2, 3)
    with pytest.raises(UserError, match=r"input_size 30x28 is not a multiple of patch_size 4; use e\.g\. 32x28"):
        classifier.build_classifier(model, 3, image_size=(30, 28))


# -------------------------------------------------------------------------------------------------- clips
def test_the_classifier_is_the_encoder_with_a_norm_and_a_head() -> None:
    """Values and gradients against the encoder's own blocks; the embedding against a 3-D convolution."""
    model = small()
    with pytest.raises(Exception, match="video models have no cls token; use --global_pool avg"):
        build_classifier(model, 3, image_size=(4, 6), global_pool="token")
    vit = build_classifier(model, 3, image_size=(4, 6)).double()
    assert "pos_embed" not in dict(vit.named_parameters())
    vit.pos_embed = model.pos_embed
    vit.load_state_dict({k: v for k, v in model.state_dict().items() if k in vit.state_dict()}, strict=False)
    with torch.no_grad():
        for parameter in (*vit.head.parameters(), *vit.fc_norm.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    clips = torch.randn(3, 2, 4, 4, 6, dtype=torch.float64)
    kernel = model.patch_embed.proj
    tokens = nn.functional.conv3d(clips, kernel.weight, kernel.bias, stride=(2, 2, 2)).flatten(2).mT
    torch.testing.assert_close(vit.patch_embed(clips), tokens, rtol=1e-9, atol=1e-9)
    for block in model.blocks:
        tokens = block(tokens + sinusoid(16, 12) if block is model.blocks[0] else tokens)
    pooled = layer_normalised_pool(tokens, vit.fc_norm.weight, vit.fc_norm.bias)
    want, got = vit.head(pooled), vit(clips)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias"):
        ours = torch.autograd.grad(got.square().sum(), vit.get_parameter(name), retain_graph=True)[0]
        theirs = torch.autograd.grad(want.square().sum(), model.get_parameter(name), retain_graph=True)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_positions_of_clips_are_resized_slot_by_slot() -> None:
    table = torch.randn(1, 3 * 8, 16)
    resized = resize_slots(table, 3, (2, 4), (4, 4))
    none = torch.zeros(1, 1, 16)  # in the place of cls
    for slot, part in enumerate(resized.chunk(3, dim=1)):
        want = resize_positions(torch.cat([none, table[:, 8 * slot : 8 * slot + 8]], dim=1), (2, 4), (4, 4))
        torch.testing.assert_close(part, want[:, 1:])
    assert torch.equal(resize_slots(table, 3, (2, 4), (2, 4)), table)
    assert build_classifier(small(), 3, image_size=(8, 6))(torch.randn(1, 2, 4, 8, 6)).shape == (1, 3)
