"""The video model: VideoMAE's numbers, and its own fast paths against slow ones."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import fasthpm
from fasthpm import loss
from fasthpm.checkpoint import load_reference
from fasthpm.checkpoint.foreign import detect_source
from fasthpm.errors import UserError
from fasthpm.model import VIDEO_EPS, HPMViT
from fasthpm.probes.features import pool_of
from fasthpm.recipe import Recipe
from tests.helpers import reference
from tests.helpers.golden import GOLDEN
from tests.helpers.videomae import their_name
from tests.helpers.videos import small

DTYPES = {"f32": torch.float32, "f64": torch.float64}
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


# -------------------------------------------------------------------------------------------------- VideoMAE's numbers
def golden(name: str) -> tuple[HPMViT, dict[str, Tensor], dict[str, Any]]:
    """Our model with VideoMAE's weights, the fixture's tensors and its description."""
    tensors = load_file(GOLDEN / "videomae.safetensors")
    cases = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    meta = next(case for case in cases if case["name"] == "videomae")
    config = {key.removeprefix("encoder_"): value for key, value in meta["config"].items()}
    for key in ("decoder_num_classes", "qkv_bias", "layernorm_eps"):
        del config[key]
    model = HPMViT(**config, video=True, predict_loss="none", norm_pix_loss=True).to(DTYPES[name])
    state = {key[3:]: value.to(DTYPES[name]) for key, value in tensors.items() if key.startswith("sd/")}
    assert detect_source(state) == "videomae"
    load_reference(model, state, "videomae")
    return model, tensors, meta


def published_gradients(model: HPMViT) -> dict[str, Tensor]:
    """Gradients under VideoMAE's names; the keys' biases, which it lacks, must have none."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        theirs = their_name(name)
        if name.endswith("attn.qkv.bias"):
            query, key, value = parameter.grad.chunk(3)
            assert key.abs().max() < 1e-6
            found[theirs.replace("qkv.bias", "q_bias")], found[theirs.replace("qkv.bias", "v_bias")] = query, value
        else:
            found[theirs] = parameter.grad
    return found


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("masks_of", ["tube", "free"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_published_videomae(name: str, masks_of: str, norm_pix: bool) -> None:
    model, tensors, meta = golden(name)
    (rtol, atol), dtype = meta["tolerance"][name], DTYPES[name]
    videos, mask = tensors["in/videos"].to(dtype), tensors[f"in/{masks_of}_mask"]
    group = f"{name}/{masks_of}/norm_{norm_pix}"
    output = model(videos, mask)
    mean, std = (values.to(dtype).reshape(3, 1, 1, 1) for values in IMAGENET)
    pixels = model.patchify(videos * std + mean)[mask].reshape(output.reconstruction.shape)
    labels = loss.channelwise_target(pixels, 3) if norm_pix else pixels
    total = output.loss if norm_pix else (output.reconstruction - labels).square().mean()
    torch.testing.assert_close(total.detach(), tensors[f"{group}/loss"], rtol=rtol, atol=atol)
    for key, got in (("labels_sample0", labels[0]), ("labels_sample0_first8", labels[0, :8])):
        if f"{group}/{key}" in tensors:
            torch.testing.assert_close(got, tensors[f"{group}/{key}"], rtol=rtol, atol=1e-5)
    if f"{name}/{masks_of}/pred_sample0" in tensors:
        want = tensors[f"{name}/{masks_of}/pred_sample0"]
        torch.testing.assert_close(output.reconstruction[0].detach(), want, rtol=rtol, atol=1e-5)
    total.backward()
    gradients = published_gradients(model)
    norm = torch.sqrt(torch.stack([g.double().square().sum() for g in gradients.values()]).sum())
    torch.testing.assert_close(norm, tensors[f"{group}/grad_norm"], rtol=rtol, atol=atol)
    if group == "f64/free/norm_True":
        for key in (key for key in tensors if key.startswith("f64/grad/")):
            torch.testing.assert_close(gradients[key.removeprefix("f64/grad/")], tensors[key], rtol=rtol, atol=atol)
        for key, want in meta["grad_l2_by_param_f64"].items():
            assert float(gradients[key].norm()) == pytest.approx(want, rel=rtol, abs=atol), key


@pytest.mark.parametrize("name", DTYPES)
def test_published_videomae_features(name: str) -> None:
    model, tensors, meta = golden(name)
    limits = dict(zip(("rtol", "atol"), meta["tolerance"][name], strict=True))
    videos = tensors["in/videos"].to(DTYPES[name])
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode(videos, tensors["in/tube_mask"]), tensors[f"{name}/tube/latent"], **limits
        )
        if name == "f64":
            want = tensors["f64/visible/latent_sample0_first16"]
            torch.testing.assert_close(model.encode(videos)[0, :16], want, **limits)


def test_published_sizes() -> None:
    cases = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    sizes = next(case for case in cases if case["name"] == "videomae")["model_sizes"]
    for size, about in sizes.items():
        with torch.device("meta"):
            options = {"decoder_depth": 4} if size == "large" else {}
            model = fasthpm.create_model(f"videomae_vit_{size}_patch16_224", **options)
        keys = sum(p.numel() // 3 for name, p in model.named_parameters() if name.endswith("attn.qkv.bias"))
        assert sum(p.numel() for p in model.parameters()) - keys == about["params"]
        assert (model.num_patches, model.mask_token.shape[-1]) == (1568, about["dec_dim"])


# -------------------------------------------------------------------------------------------------- the model
@settings(max_examples=15, deadline=None)
@given(
    slots=st.integers(1, 3),
    frames=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    side=st.integers(1, 2),
    channels=st.integers(1, 3),
)
def test_any_length_and_size_is_cut_as_in_the_loop(
    slots: int, frames: int, rows: int, columns: int, side: int, channels: int
) -> None:
    size: dict[str, Any] = {"img_size": (rows * side, columns * side), "patch_size": side, "in_chans": channels}
    model = small(**size, num_frames=slots * frames, tubelet_size=frames, depth=1, decoder_depth=1)
    clips = torch.randn(2, channels, slots * frames, rows * side, columns * side, dtype=torch.float64)
    patches = model.patchify(clips)
    assert torch.equal(patches[1], reference.tubelets_of(clips[1], frames, side))
    back = model.unpatchify(patches)
    assert torch.equal(back, clips[:, :, 0] if slots * frames == 1 else clips)
    assert model.encode(clips).shape == (2, slots * rows * columns, 16)
    assert model.predict_loss(clips).shape == (2, slots * rows * columns)


def test_a_video_of_one_frame_is_an_image() -> None:
    """Same patches and features, given as image or as clip; and an image model takes clips of one frame."""
    for model in (small(num_frames=1, tubelet_size=1), small(num_frames=1, tubelet_size=1, video=False)):
        images = torch.randn(2, 2, 4, 6, dtype=torch.float64)
        assert torch.equal(model.encode(images), model.encode(images[:, :, None]))


def slow_forward(model: HPMViT, clips: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per-patch loss and predicted difficulty of masked patches, one clip at a time, with a real 3-D convolution,
    boolean indexing and every token through every block."""
    kernel, side, frames = model.patch_embed.proj, model.patch_size, model.tubelet_size
    losses, difficulties = [], []
    for clip, row in zip(clips, mask, strict=True):
        grid = torch.nn.functional.conv3d(clip[None], kernel.weight, kernel.bias, stride=(frames, side, side))
        hidden = (grid.flatten(2).mT + reference.sinusoid(16, len(row)))[:, ~row]
        for block in model.blocks:
            hidden = block(hidden)
        places = reference.sinusoid(8, len(row))[None]
        seen = model.norm(hidden) @ model.decoder_embed.weight.T + places[:, ~row]
        tokens = torch.cat([seen, model.mask_token + places[:, row]], 1)
        rec = dif = tokens
        for block in model.decoder_blocks:
            rec = block(rec)
        for block in model.decoder_blocks_losspred:
            dif = block(dif)
        count = int(row.sum())
        prediction = model.decoder_pred(model.decoder_norm(rec))[0, -count:]
        target = reference.tubelets_of(clip, frames, side)[row]
        if model.norm_pix_loss:
            target = torch.stack([reference.normalised_tubelet(p, model.in_chans, VIDEO_EPS) for p in target])
        losses.append((prediction - target).square().mean(-1))
        difficulties.append(model.decoder_pred_losspred(model.decoder_norm_losspred(dif))[0, -count:])
    return torch.stack(losses), torch.stack(difficulties)


@pytest.mark.parametrize("masked", [1, 7, 11])
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("again", [False, True])
def test_lean_forward_equals_slow_forward(masked: int, norm_pix: bool, again: bool) -> None:
    """Values and all gradients; `again`: with activation checkpointing. Positions are float32 tables."""
    model = small(norm_pix_loss=norm_pix, activation_checkpointing=again)
    clips = torch.randn(3, 2, 4, 4, 6, dtype=torch.float64)
    mask = torch.rand(3, 12).argsort(1) < masked
    output = model(clips, mask, num_masked=masked)
    per_patch, predicted = slow_forward(model, clips, mask)
    torch.testing.assert_close(output.per_patch_loss, per_patch.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.predicted_difficulty, predicted, rtol=1e-5, atol=1e-6)
    total = per_patch.mean() + reference.ranking_loss(predicted, per_patch.detach())
    torch.testing.assert_close(output.loss, total, rtol=1e-6, atol=1e-6)
    parameters = list(model.parameters())
    fast, want = (torch.autograd.grad(x, parameters) for x in (output.loss, total))
    for a, b in zip(fast, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_computes_blocks_again_and_gradients_bit_for_bit() -> None:
    results = []
    for again in (False, True):
        model, calls = small(activation_checkpointing=again), [0]
        for block in (*model.blocks, *model.decoder_blocks, *model.decoder_blocks_losspred):
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        output = model(torch.ones(2, 2, 4, 4, 6).double().cumsum(-1), torch.arange(12).repeat(2, 1) < 9)
        output.loss.backward()
        results.append((calls[0], output.loss, *(p.grad for p in model.parameters())))
    assert (results[0][0], results[1][0]) == (6, 12)
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert torch.equal(a, b)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(UserError, match="an image model has one frame, not 16 in tubelets of 2; use a video model"):
        fasthpm.create_model("hpm_vit_nano_patch4_28", num_frames=16, tubelet_size=2)
    with pytest.raises(UserError, match="7 frames are not a multiple of tubelet_size 2"):
        small(num_frames=7)
    with pytest.raises(ValueError, match=r"expected \[B, C, \(T,\) H, W\] with C, T, H, W \(2, 4, 4, 6\)"):
        small().encode(torch.zeros(1, 2, 6, 4, 6))
    with pytest.raises(UserError, match=r"num_frames 5 is not a multiple of tubelet_size 2; .* --num_frames 4"):
        Recipe(model="hpm_vit_nano_patch8_32_video", num_frames=5, tubelet_size=2)
    with pytest.raises(UserError, match="or the model hpm_vit_base_patch16_224_video"):
        Recipe(model="videomae_vit_base_patch16_224")
    with pytest.raises(UserError, match="--pool cls: video models have no cls token; use --pool mean"):
        pool_of(small(), "cls")
    with pytest.raises(UserError, match="takes images; create a video model"):
        load_reference(fasthpm.create_model("mae_vit_nano_patch4_28"), {"mask_token": torch.zeros(1, 1, 8)}, "videomae")
