"""UPerNet on our encoder: the same features, the losses of mmseg, names for the layer decay, and what is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasthpm.dense.pairs import IGNORED
from fasthpm.dense.segmentation.network import AUXILIARY_WEIGHT, DroppingConv, Segmenter, build_segmenter, pixel_loss
from fasthpm.dense.segmentation.norms import SharedNorm
from fasthpm.errors import UserError
from fasthpm.exchange.forms import levels as levels_after
from fasthpm.model import HPMViT, create_model
from fasthpm.probes.classifier import layer_id, resize_positions

SMALL = {"embed_dim": 32, "num_heads": 2, "decoder_embed_dim": 32, "decoder_num_heads": 2, "decoder_depth": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "square": {"img_size": 32, "patch_size": 8},
    "wide": {"img_size": (16, 48), "patch_size": 8},
    "deep": {"img_size": 28, "patch_size": 14, "depth": 12},
    "odd depth": {"img_size": 24, "patch_size": 8, "depth": 7, "num_heads": 4},
    "grey": {"img_size": 32, "patch_size": 8, "in_chans": 1},
}


def model_of(seed: int = 0, **changes: Any) -> HPMViT:
    """A small model none of whose weights are zero."""
    torch.manual_seed(seed)
    model = create_model("mae_vit_nano_patch4_28", **{**SMALL, **changes})
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    return model


def build(model: HPMViT, image_size: tuple[int, int] | None = None, **options: Any) -> Segmenter:
    return build_segmenter(model, 5, image_size=image_size or model.img_size, width=16, **options)


def images_for(size: tuple[int, int], channels: int = 3, count: int = 2) -> Tensor:
    return torch.randn(count, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def block_outputs(model: HPMViT, images: Tensor, positions: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """What every block of our own encoder gives, as maps [B, D, rows, columns]."""
    side, (rows, columns) = model.patch_size, grid
    cut = images.unflatten(3, (columns, side)).unflatten(2, (rows, side))  # B, C, rows, side, columns, side
    patches = model.patch_embed(cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)) + positions[:, 1:]
    cls = (model.cls_token + positions[:, :1]).expand(len(images), -1, -1)
    tokens, found = torch.cat([cls, patches], dim=1), []
    for block in model.blocks:
        tokens = block(tokens)
        found.append(tokens[:, 1:].transpose(1, 2).unflatten(2, grid))
    return found


@pytest.mark.parametrize("extras", [{}, {"relative_positions": True, "layer_scale": 1.0}], ids=["plain", "mmseg"])
@pytest.mark.parametrize("shape", SHAPES)
def test_features_of_every_level_are_our_blocks(shape: str, extras: dict[str, Any]) -> None:
    model = model_of(**SHAPES[shape]).double()
    if extras and model.grid_size[0] != model.grid_size[1]:
        extras = {"layer_scale": 1.0}
    network = build(model, **extras).double().eval()
    images = images_for(model.img_size, model.in_chans)
    ours = block_outputs(model, images, model.pos_embed, model.grid_size)
    levels = network.features(images)
    assert len(levels) == 4
    for level, place in zip(levels, levels_after(len(model.blocks)), strict=True):
        torch.testing.assert_close(level, ours[place - 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [(48, 48), (24, 40)])
def test_positions_are_interpolated_to_the_crop_and_to_whole_images(size: tuple[int, int]) -> None:
    model = model_of(img_size=32, patch_size=8).double()
    network = build(model, size).double().eval()
    grid = (size[0] // 8, size[1] // 8)
    positions = resize_positions(model.pos_embed, model.grid_size, grid)
    ours = block_outputs(model, images_for(size), positions, grid)
    torch.testing.assert_close(network.features(images_for(size))[-1], ours[-1], rtol=0, atol=1e-10)
    larger = (grid[0] + 1, grid[1] + 2)  # an image that is tested as a whole
    images = images_for((larger[0] * 8, larger[1] * 8))
    ours = block_outputs(model, images, resize_positions(positions, grid, larger), larger)
    torch.testing.assert_close(network.features(images)[-1], ours[-1], rtol=0, atol=1e-10)


def test_levels_are_those_of_mmseg_and_never_the_same() -> None:
    assert levels_after(12) == [4, 6, 8, 12]
    assert levels_after(24) == [8, 12, 16, 24]
    for depth in range(4, 40):
        assert len(set(levels_after(depth))) == 4
        assert levels_after(depth)[-1] == depth


def test_losses_are_cross_entropies_by_a_loop_over_pixels() -> None:
    network = build(model_of(img_size=16, patch_size=4)).double().eval().requires_grad_(False)
    images = images_for((16, 16))
    targets = torch.randint(0, 5, (2, 16, 16), dtype=torch.uint8)
    targets[0, :7] = IGNORED
    maps = network.net.backbone(images).feature_maps
    found = network(images, targets)
    for name, head, weight in (
        ("loss_seg", network.net.decode_head, 1.0),
        ("loss_aux", network.net.auxiliary_head, AUXILIARY_WEIGHT),
    ):
        logits = F.interpolate(head(maps), size=(16, 16), mode="bilinear")
        total = 0.0
        for image in range(2):
            for row in range(16):
                for column in range(16):
                    label = int(targets[image, row, column])
                    if label != IGNORED:
                        total -= float(logits[image, :, row, column].log_softmax(0)[label])
        assert float(found[name]) == pytest.approx(weight * total / targets.numel(), rel=1e-9)
    torch.testing.assert_close(
        network(images), F.interpolate(network.net.decode_head(maps), size=(16, 16), mode="bilinear")
    )


def test_images_that_are_ignored_as_a_whole_give_no_loss_and_no_gradient() -> None:
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((2, 4, 4), IGNORED, dtype=torch.uint8))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_every_weight_learns_and_the_layer_decay_knows_it() -> None:
    network = build(model_of(img_size=16, patch_size=4), relative_positions=True, layer_scale=1.0)
    sum(network(images_for((16, 16)).float(), torch.ones(2, 16, 16, dtype=torch.uint8)).values()).backward()
    layers = {}
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        layers[name.removeprefix("net.")] = layer_id(network.encoder_name(name), 4)
    for name, layer in layers.items():
        inner = name.removeprefix("backbone.beit.")
        block = inner.removeprefix("layers.").partition(".")[0]
        expected = 0 if inner.startswith("embeddings.") else int(block) + 1 if inner.startswith("layers.") else 5
        assert layer == expected, name
    assert network.encoder_name("net.backbone.beit.layers.3.attention.k_proj.weight") == "blocks.3.attn.k_proj.weight"
    assert network.encoder_name("net.backbone.beit.embeddings.position_embeddings") == "pos_embed"
    assert network.encoder_name("net.backbone.fpn.fpn2.weight") == ""


def test_heads_are_drawn_from_the_seed_alone() -> None:
    model = model_of(img_size=16, patch_size=4)
    first, second, other = (
        build(model, seed=1),
        build(model_of(img_size=16, patch_size=4), seed=1),
        build(model, seed=2),
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    name = "net.decode_head.classifier.weight"
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert first.get_parameter(name).std().item() == pytest.approx(0.01, rel=0.4)


def test_whole_channels_are_dropped_before_the_classifiers_in_training_only() -> None:
    layer = DroppingConv(200, 3, 1)
    maps = torch.randn(4, 200, 3, 3)
    torch.manual_seed(5)
    dropped = F.dropout2d(maps, 0.1)
    torch.manual_seed(5)
    torch.testing.assert_close(layer(maps), F.conv2d(dropped, layer.weight, layer.bias))
    torch.testing.assert_close(layer.eval()(maps), F.conv2d(maps, layer.weight, layer.bias))
    network = build(model_of(img_size=16, patch_size=4))
    assert isinstance(network.net.decode_head.classifier, DroppingConv)
    assert isinstance(network.net.auxiliary_head.classifier, DroppingConv)


def test_it_computes_in_bfloat16_close_to_float32() -> None:
    network, exact = (build(model_of(img_size=32, patch_size=8)) for _ in range(2))
    network.bfloat16()
    images, targets = images_for((32, 32), count=4).float(), torch.randint(0, 5, (4, 32, 32))
    for one in (network, exact):
        one.net.decode_head.classifier.eval()  # no dropout
        one.net.auxiliary_head.classifier.eval()
    found, expected = network(images, targets), exact(images, targets)
    for name in expected:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name], rtol=0.03, atol=0)
    sum(found.values()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())
    norms = [module for module in network.modules() if isinstance(module, SharedNorm)]
    assert len(norms) == 14  # all of them
    kinds = [one.net.backbone.config._attn_implementation for one in (network, exact)]
    assert kinds == ["eager", "sdpa"]  # the faster one on a CPU in bfloat16
    assert all(norm.running_mean is not None and norm.running_mean.dtype == torch.float32 for norm in norms)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"depth": 3}, {}, "this encoder has 3 blocks"),
    (
        {},
        {"image_size": (30, 28)},
        "input_size is 30x28, expected a multiple of patch_size 4, at least twice; use e.g. ",
    ),
    ({}, {"image_size": (4, 28)}, "use e.g. 8x28"),
    ({}, {"image_size": (16, 28), "relative_positions": True}, "relative_positions needs square crops"),
]


@pytest.mark.parametrize(("changes", "options", "message"), REFUSED)
def test_what_upernet_cannot_take_is_refused(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(model_of(**changes), **options)
    assert "\n" not in str(caught.value)


def test_a_video_run_is_refused() -> None:
    with pytest.raises(UserError, match="this run was trained on video; give a run of images"):
        build(create_model("videomae_vit_nano_patch8_32"), (32, 32))
