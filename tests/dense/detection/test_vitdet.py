"""ViTDet's backbone against our encoder's own blocks, and against timm's form of it with windows."""

import functools

import pytest
import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from fasthpm.dense.detection.vitdet import RelativeAttention, ViTDet, Windows, from_windows, global_blocks, into_windows
from fasthpm.errors import UserError
from fasthpm.model import HPMViT, create_model
from fasthpm.probes.classifier import resize_positions

SIDE = 4


@pytest.fixture
def model() -> HPMViT:
    """A nano encoder of 7 x 7 patches, six blocks deep, in float64."""
    torch.manual_seed(0)
    made = HPMViT(
        img_size=28, patch_size=SIDE, embed_dim=32, depth=6, num_heads=2, decoder_depth=1, decoder_num_heads=2
    )
    return made.double().eval()


def images_of(grid: tuple[int, int], seed: int = 1) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, grid[0] * SIDE, grid[1] * SIDE, dtype=torch.float64, generator=made)


def plain(model: HPMViT, images: Tensor) -> list[Tensor]:
    """What the encoder's own blocks make of the patches alone: [B, L, D] after every block."""
    grid = (images.shape[2] // SIDE, images.shape[3] // SIDE)
    cut = images.unflatten(3, (grid[1], SIDE)).unflatten(2, (grid[0], SIDE)).permute(0, 2, 4, 3, 5, 1)
    positions = resize_positions(model.pos_embed, model.grid_size, grid)[:, 1:]
    tokens = model.patch_embed(cut.flatten(3).flatten(1, 2)) + positions
    found = []
    for block in model.blocks:
        tokens = block(tokens)
        found.append(tokens)
    return found


@pytest.mark.parametrize("grid", [(7, 7), (10, 6)])
def test_every_map_is_the_encoders(model: HPMViT, grid: tuple[int, int]) -> None:
    """All blocks global: equal to 1e-10 at every block, at the pretraining's grid and at another."""
    net = ViTDet(model, Windows(grid, window=0)).double().eval()
    images = images_of(grid)
    ours = net.maps(images, every=True)
    theirs = plain(model, images)
    assert len(ours) == len(model.blocks)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_.flatten(2).transpose(1, 2), theirs_, rtol=0, atol=1e-10)
    assert torch.equal(net(images), ours[-1])


def test_only_the_cls_token_is_missing(model: HPMViT) -> None:
    """Without cls among the encoder's tokens `encode` gives these maps after its norm; with it, other ones."""
    net = ViTDet(model, Windows((7, 7), window=0)).double().eval()
    images = images_of((7, 7))
    ours = model.norm(net(images).flatten(2).transpose(1, 2))
    assert (model.encode(images)[:, 1:] - ours).abs().max() > 1e-6
    model.num_prefix_tokens, positions = 0, model.pos_embed
    model.pos_embed = positions[:, 1:]
    torch.testing.assert_close(model.encode(images), ours, rtol=0, atol=1e-10)


def timm_of(net: ViTDet, grid: tuple[int, int], window: int, relative: bool) -> nn.Module:
    """timm's ViT-Det with the same weights, and positions for this grid."""
    twin = VisionTransformerSAM(
        img_size=(grid[0] * SIDE, grid[1] * SIDE),
        patch_size=SIDE,
        embed_dim=32,
        depth=6,
        num_heads=2,
        num_classes=0,
        neck_chans=0,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        window_size=window,
        global_attn_indexes=global_blocks(6),
        use_rel_pos=relative,
    ).double()
    state = {key: value for key, value in net.state_dict().items() if key != "pos_embed"}
    state["pos_embed"] = net._positions(grid)
    missing = twin.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith(("neck", "head")) for key in missing.missing_keys)
    return twin.eval()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("grid", [(9, 9), (8, 12), (10, 7)])
def test_windows_are_timms(model: HPMViT, grid: tuple[int, int], relative: bool) -> None:
    """Padded windows, global blocks and relative positions, by name: values and gradients."""
    net = ViTDet(model, Windows(grid, window=4, relative=relative, drop_path=0)).double()
    for name, parameter in net.named_parameters():
        if ".rel_pos_" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    twin = timm_of(net, grid, 4, relative)
    images = images_of(grid)
    ours, theirs = net(images), twin.forward_intermediates(images, 1, intermediates_only=True)[-1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    wanted = dict(twin.named_parameters())
    for name, parameter in net.named_parameters():
        if name != "pos_embed":
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=0, atol=1e-9)


def test_relative_positions_change_nothing_at_first(model: HPMViT) -> None:
    images = images_of((9, 9))
    with_them = ViTDet(model, Windows((9, 9), window=4, relative=True)).double().eval()
    without = ViTDet(model, Windows((9, 9), window=4)).double().eval()
    torch.testing.assert_close(with_them(images), without(images), rtol=0, atol=1e-12)


def test_relative_bias_as_loops() -> None:
    """The bias of a query at (r, c) for a key at (s, t): q · H[r - s] + q · W[c - t]."""
    torch.manual_seed(0)
    attention = RelativeAttention(8, 2, (3, 2)).double()
    nn.init.normal_(attention.rel_pos_h)
    nn.init.normal_(attention.rel_pos_w)
    query = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    bias = attention.bias(query)
    for q in range(6):
        for k in range(6):
            row, column = q // 2 - k // 2 + 2, q % 2 - k % 2 + 1
            tables = attention.rel_pos_h[row] + attention.rel_pos_w[column]
            torch.testing.assert_close(bias[0, :, q, k], query[0, :, q] @ tables)


@pytest.mark.parametrize("side", [(4, 4), (5, 5), (3, 3)])
def test_windows_as_loops(side: tuple[int, int]) -> None:
    tokens = torch.randn(2, 5, 7, 3)
    windows = into_windows(tokens, side)
    across = -(-7 // side[1])
    down = -(-5 // side[0])
    assert windows.shape == (2 * down * across, *side, 3)
    for image in range(2):
        for row in range(5):
            for column in range(7):
                number = image * down * across + row // side[0] * across + column // side[1]
                found = windows[number, row % side[0], column % side[1]]
                assert torch.equal(found, tokens[image, row, column])
    assert windows.abs().sum() == pytest.approx(float(tokens.abs().sum()), rel=1e-6)  # the rest is zero
    assert torch.equal(from_windows(windows, (5, 7)), tokens)


def test_global_blocks() -> None:
    assert global_blocks(12) == (2, 5, 8, 11)
    assert global_blocks(24) == (5, 11, 17, 23)
    assert global_blocks(32) == (7, 15, 23, 31)
    assert global_blocks(4) == (0, 1, 2, 3)
    assert global_blocks(2) == (0, 1)
    assert global_blocks(1) == (0,)


def test_a_window_as_large_as_the_grid_is_none(model: HPMViT) -> None:
    """Nothing is padded then."""
    net = ViTDet(model, Windows((9, 9), window=14))
    assert all(block.window == 0 for block in net.blocks)
    net = ViTDet(model, Windows((9, 9), window=8))
    assert [block.window for block in net.blocks] == [0, 8, 0, 0, 8, 0]


def test_blocks_computed_again_give_the_same_gradients(model: HPMViT) -> None:
    grads = []
    for again in (False, True):
        net = ViTDet(model, Windows((9, 9), window=4, drop_path=0.5, again=again)).double().train()
        torch.manual_seed(3)
        net(images_of((9, 9))).square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    for once, twice in zip(*grads, strict=True):
        torch.testing.assert_close(once, twice, rtol=0, atol=1e-10)


def test_drop_path_is_per_image_and_grows(model: HPMViT) -> None:
    """A dropped image's branch is dropped in all its windows, as in detectron2; timm's form drops windows."""
    net = ViTDet(model, Windows((9, 9), window=4, drop_path=0.5)).double().train()
    assert [round(block.drop_path.drop_prob, 3) for block in net.blocks] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    block = net.blocks[4]
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    tokens = torch.randn(64, 9, 9, 32, dtype=torch.float64)
    same = (block(tokens) == tokens).flatten(1)
    assert torch.equal(same.all(1), same.any(1))
    assert 8 < int(same.all(1).sum()) < 56


def test_positions_are_trained_and_interpolated_in_place(model: HPMViT) -> None:
    net = ViTDet(model, Windows((14, 14), window=0)).double()
    net(images_of((14, 14))).sum().backward()
    assert net.pos_embed.shape == (1, 49, 32)
    assert net.pos_embed.grad is not None
    assert bool((net.pos_embed.grad != 0).any(2).all())


def test_videos_are_refused() -> None:
    model = create_model("hpm_vit_nano_patch8_32_video")
    with pytest.raises(UserError, match="trained on video"):
        ViTDet(model, Windows((4, 4)))
