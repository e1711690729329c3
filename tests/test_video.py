"""Video: VideoMAE's numbers, tubelets and positions against loops, masks slot by slot, and clips through the step."""

import argparse
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import fasthpm
from fasthpm import loss
from fasthpm import mask as masks
from fasthpm.__main__ import dispatch
from fasthpm.checkpoint import load_reference, weights
from fasthpm.checkpoint.foreign import detect_source
from fasthpm.data import DatasetInfo, build_loader
from fasthpm.errors import UserError
from fasthpm.exchange import exporting
from fasthpm.layers import attend_plain, sinusoid_positions
from fasthpm.model import VIDEO_EPS, HPMViT
from fasthpm.patches import model_of
from fasthpm.pictures import drawing, panels
from fasthpm.probes.features import pool_of
from fasthpm.recipe import Recipe
from fasthpm.run.records import read_metrics
from fasthpm.speed import flops
from fasthpm.step import Step
from tests.helpers import reference
from tests.helpers.launch import ROOT, check_ranks
from tests.helpers.masks import coarse_noise, rows_of
from tests.helpers.video_fixtures import prepare_videos, video_folder
from tests.helpers.videos import small, tiny, video_run

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"f32": torch.float32, "f64": torch.float64}
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
INFO = DatasetInfo(8, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), ())


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


def their_name(name: str) -> str:
    """VideoMAE's name of one of our tensors."""
    decoder = {
        "decoder_embed.": "encoder_to_decoder.",
        "decoder_blocks.": "decoder.blocks.",
        "decoder_norm.": "decoder.norm.",
        "decoder_pred.": "decoder.head.",
        "mask_token": "mask_token",
    }
    ours = next((key for key in decoder if name.startswith(key)), "")
    return decoder[ours] + name.removeprefix(ours) if ours else f"encoder.{name}"


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


def test_published_tube_masks() -> None:
    cases = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    for case in next(case for case in cases if case["name"] == "videomae")["tube_mask_invariants"]:
        slots, rows, columns = case["window"]
        plan = masks.MaskPlan("tube", case["mask_ratio"], (rows, columns), slots)
        mask = masks.draw_mask(plan, torch.rand(2, 3, plan.noise_size))
        assert mask.sum(1).tolist() == [case["total_masked"]] * 3 == [plan.num_masked] * 3
        frames = mask.reshape(3, slots, -1)
        assert torch.equal(frames, frames[:, :1].expand_as(frames))


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


@settings(max_examples=10, deadline=None)
@given(dim=st.integers(1, 9), count=st.integers(1, 9))
def test_positions_are_the_loop(dim: int, count: int) -> None:
    torch.testing.assert_close(sinusoid_positions(dim, count), reference.sinusoid(dim, count).float())


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


# -------------------------------------------------------------------------------------------------- masks
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    slots=st.integers(2, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    policy=st.sampled_from(list(masks.POLICIES)),
    ratio=st.floats(0.1, 0.95),
    alpha=st.floats(0, 1),
)
def test_every_policy_masks_exactly_in_every_slot(
    seed: int, slots: int, rows: int, columns: int, policy: str, ratio: float, alpha: float
) -> None:
    """The count of a slot is exact for every policy but random and attention, whose counts are exact over the clip."""
    if policy == "uniform":
        rows, columns, ratio = 2 * rows, 2 * columns, 0.75
    plan, size = masks.MaskPlan(policy, ratio, (rows, columns), slots), rows * columns
    noise = coarse_noise(seed, 2, 3, plan.noise_size)
    difficulty = torch.randn(3, slots * size, generator=torch.Generator().manual_seed(seed))
    mask = masks.draw_mask(plan, noise, difficulty, alpha)
    assert mask.sum(1).tolist() == [plan.num_masked] * 3
    frames = mask.reshape(3, slots, size)
    if policy not in ("random", "attention"):
        assert (frames.sum(2) == plan.num_masked // slots).all()
    if masks.POLICIES[policy].tube:
        assert torch.equal(frames, frames[:, :1].expand_as(frames))
    easiest = policy == "hpm_easiest"
    for i, values in enumerate(difficulty.reshape(3, slots, size).tolist()):
        ties, rest = noise[:, i].tolist()
        if policy == "hpm_tube":
            summed = [sum(frame[k] for frame in values) for k in range(size)]
            want = reference.easy_to_hard_mask(summed, ratio, alpha, ties[:size], rest[:size], False)
            assert rows_of(frames[i])[0] == want
        elif masks.POLICIES[policy].follows == "difficulty":
            for slot, row in enumerate(rows_of(frames[i])):
                part = slice(slot * size, (slot + 1) * size)
                assert row == reference.easy_to_hard_mask(values[slot], ratio, alpha, ties[part], rest[part], easiest)


def test_videos_of_the_papers_size_are_masked_as_published() -> None:
    """16 x 224 x 224 at 0.9: TPAMI masks every slot on its own, VideoMAE's tubes leave 160 patches visible."""
    for policy, count in (("hpm", 8 * 177), ("hpm_tube", 8 * 177), ("tube", 1408), ("random", 1412)):
        assert masks.MaskPlan(policy, 0.9, (14, 14), 8).num_masked == count
    plan = masks.MaskPlan("hpm", 0.9, (14, 14), 8)
    mask = masks.draw_mask(plan, torch.rand(2, 2, 1568), torch.rand(2, 1568), 0.0).reshape(2, 8, 196)
    assert not torch.equal(mask[:, 0], mask[:, 1])  # not a tube


# -------------------------------------------------------------------------------------------------- the step


def test_the_step_cuts_clips_as_the_model_does() -> None:
    step = Step(model_of(tiny()), tiny(), INFO)
    clips = torch.randint(0, 256, (2, 8, 16, 16, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values).reshape(3, 1, 1, 1) * 255 for values in (INFO.mean, INFO.std))
    pixels = (clips.permute(0, 4, 1, 2, 3).float() - mean) / std
    torch.testing.assert_close(step.normalized_patches(clips), step.student.patchify(pixels))


@pytest.mark.parametrize("policy", ["hpm", "hpm_tube", "tube", "random", "block"])
def test_the_step_masks_alike_whatever_the_batch(policy: str) -> None:
    """Masks are functions of (seed, update, sample): the same alone as in a batch, others for other seeds."""
    clips, ids = torch.randint(0, 256, (2, 8, 16, 16, 3), dtype=torch.uint8), torch.tensor([5, 9])
    update, alpha = torch.tensor(3), torch.tensor(0.5, dtype=torch.float64)
    recipe = tiny(mask_policy=policy)

    def run(recipe: Recipe, rows: slice) -> Tensor:
        step = Step(model_of(recipe), recipe, INFO)
        step.attach_teacher(model_of(tiny(seed=1)))
        return step(clips[rows], ids[rows], update, alpha).mask

    both = run(recipe, slice(0, 2))
    assert torch.equal(both[1:], run(recipe, slice(1, 2)))
    assert not torch.equal(both, run(dataclasses.replace(recipe, seed=7), slice(0, 2)))
    assert both.sum(1).tolist() == [recipe.num_masked] * 2


def test_synthetic_clips_move_and_begin_as_the_images() -> None:
    options: dict[str, Any] = {"batch_size": 4, "image_size": (16, 20), "channels": 3}
    (clips,) = build_loader("synthetic:4", num_frames=3, sampling_rate=2, **options)
    (images,) = build_loader("synthetic:4", **options)
    assert clips.images.shape == (4, 3, 16, 20, 3)
    assert torch.equal(clips.images[:, 0], images.images)
    assert torch.equal(clips.crops, images.crops)
    (closer,) = build_loader("synthetic:4", num_frames=5, **options)
    assert torch.equal(closer.images[:, ::2], clips.images)
    assert not torch.equal(clips.images[:, 0], clips.images[:, 1])


def test_flop_formula_counts_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula against torch's own counter over one whole step, within 1 %."""
    monkeypatch.setattr("fasthpm.layers.attend", attend_plain)  # torch does not count its fused CPU kernel
    from torch.utils.flop_counter import FlopCounterMode

    for changes in ({}, {"model": "videomae_vit_nano_patch8_32", "mask_policy": "tube", "predict_loss": "none"}):
        recipe = tiny(input_size="32", channels=1, mask_ratio=0.9, **changes)
        model = model_of(recipe)
        clips, mask = torch.randn(2, 1, 8, 32, 32), torch.arange(64).repeat(2, 1) < recipe.num_masked
        with FlopCounterMode(display=False) as counter:
            if recipe.uses_teacher:
                with torch.no_grad():
                    model.predict_loss(clips)
            model(clips, mask).loss.backward()
        assert counter.get_total_flops() / 2 == pytest.approx(flops.step_flops(model, recipe)["total"], rel=0.01)


def test_the_ranking_loss_of_a_video_stores_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 clips of 1,416 masked patches: no tensor of the forward or backward pass is near [B, M, M] in size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(
                [largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))]
            )
            return out

    predicted, actual = torch.randn(2, 1416, requires_grad=True), torch.rand(2, 1416)
    with Watch():
        loss.ranking_loss(predicted, actual).backward()
    assert largest <= loss.BLOCK_ELEMENTS["cpu"] < 2 * 1416**2 / 10


# -------------------------------------------------------------------------------------------------- whole runs


def their_names(model: HPMViT) -> dict[str, Tensor]:
    """A state dict as VideoMAE's trainer writes it: no positions, no biases of keys."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("pos_embed") or "losspred" in name:
            continue
        theirs = their_name(name)
        if name.endswith("attn.qkv.bias"):
            query, _, values = value.chunk(3)
            state[theirs.replace("qkv.bias", "q_bias")], state[theirs.replace("qkv.bias", "v_bias")] = query, values
        else:
            state[theirs] = value
    return state


def test_a_full_videomae_checkpoint_becomes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-B's keys and shapes, in half precision, with the arguments that the trainer stores."""
    torch.manual_seed(0)
    model = fasthpm.create_model("videomae_vit_base_patch16_224").half()
    stored = argparse.Namespace(num_frames=16, input_size=224, normlize_target=True, mask_ratio=0.9)
    torch.save({"model": {f"module.{k}": v for k, v in their_names(model).items()}, "args": stored}, tmp_path / "b.pth")
    dispatch(["import", str(tmp_path / "b.pth"), "-o", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "videomae checkpoint: base, patches of 16, 16 frames of 224x224x3, decoder 384 x 4" in said
    assert "12 heads, mask_ratio 0.9, decoder_heads 6: not told by the shapes" in said
    again, recipe = weights.load_weights(tmp_path / "run")
    assert (recipe.model, recipe.mask_policy, recipe.num_masked) == ("videomae_vit_base_patch16_224", "tube", 1408)
    assert (recipe.norm_pix_loss, recipe.decoder_heads, recipe.tubelet_size) == (True, 6, 2)
    want = {name: value.float() for name, value in model.state_dict().items() if not name.endswith("pos_embed")}
    for name, value in want.items():
        if name.endswith("qkv.bias"):
            value[len(value) // 3 : 2 * len(value) // 3] = 0
        assert torch.equal(again.state_dict()[name], value), name


def test_imports_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = their_names(model_of(tiny()))

    def refused(message: str, changed: dict[str, Tensor], *flags: str) -> None:
        save_file({key: value.clone() for key, value in changed.items()}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=message):
            dispatch(["import", str(tmp_path / "x.safetensors"), "-o", str(tmp_path / "run"), *flags])

    heads, size = ["--decoder_heads", "2"], ["--input_size", "16", "--num_frames", "8"]
    refused("decoders are 32 wide, and shapes do not tell their number of heads", state, *size)
    lacking = {key: value for key, value in state.items() if not key.endswith("0.attn.v_bias")}
    refused(r"missing \['blocks.0.attn.qkv.bias'", lacking, *heads, *size)
    flat = {**state, "encoder.patch_embed.proj.weight": torch.zeros(128, 3, 8, 8)}
    refused("source videomae: these are an image model's weights", flat, *heads, *size)
    refused("of another model: .*tubelet_size", state, "--recipe", "mae_vit_base_in1k_200e")


def test_an_encoder_of_a_finetuned_videomae_is_taken(tmp_path: Path) -> None:
    """Classifiers have no prefix, and normalise the mean of the tokens (fc_norm) in place of the tokens."""
    model = model_of(tiny())
    state = {k.removeprefix("encoder."): v for k, v in their_names(model).items() if k.startswith("encoder.")}
    state |= {f"fc_norm.{k}": state.pop(f"norm.{k}") for k in ("weight", "bias")} | {"head.weight": torch.zeros(5, 128)}
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "ft.safetensors")
    flags = ("--encoder_only", "--input_size", "16", "--num_frames", "8")
    dispatch(["import", str(tmp_path / "ft.safetensors"), "-o", str(tmp_path / "run"), *flags])
    clips = torch.randn(1, 3, 8, 16, 16)
    torch.testing.assert_close(weights.load_weights(tmp_path / "run")[0].encode(clips), model.encode(clips))


def test_huggingface_computes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Key biases away from zero, which VideoMAEModel does not have; and its processor normalises as the run did."""
    run, model = video_run(tmp_path / "run", input_size="16x24")
    assert model.blocks[0].attn.qkv.bias[128:256].abs().min() > 0  # type: ignore[union-attr, index, operator]
    info = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 2]}
    exporting.export_weights(model, weights.load_weights(run)[1], run / "model.safetensors", info=info)
    dispatch(["export", str(run), "--format", "hf_videomae", "-o", str(tmp_path / "hf")])
    assert "VideoMAEModel.from_pretrained" in capsys.readouterr().out
    import transformers

    clips = torch.randn(2, 3, 8, 16, 24)
    theirs = transformers.VideoMAEModel.from_pretrained(tmp_path / "hf")(clips.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(theirs, model.encode(clips), rtol=1e-4, atol=1e-4)
    keys = load_file(tmp_path / "hf" / "model.safetensors")
    assert {k.rpartition("attention.")[2] for k in keys if k.startswith("encoder.layer.0.attention.attention")} == {
        "query.weight",
        "key.weight",
        "value.weight",
        "q_bias",
        "v_bias",
    }


def test_exports_of_videos_to_image_libraries_are_refused(tmp_path: Path) -> None:
    run, model = video_run(tmp_path / "run")
    for form, library in (("timm", "timm"), ("hf_vit", "transformers"), ("torchvision", "torchvision")):
        with pytest.raises(UserError, match=f"{library} has no video ViT like this one; use one of hf_videomae, safe"):
            dispatch(["export", str(run), "--format", form, "-o", str(tmp_path / "x.safetensors")])
    dispatch(["export", str(run), "-o", str(tmp_path / "all.safetensors")])
    dispatch(["import", str(tmp_path / "all.safetensors"), "-o", str(tmp_path / "back")])
    again, recipe = weights.load_weights(tmp_path / "back")
    assert recipe == weights.load_weights(run)[1]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


class Oracle(HPMViT):
    """A model whose reconstruction is the target itself."""

    def forward(self, images: Tensor, mask: Tensor, **options: Any) -> Any:
        output = super().forward(images, mask, **options)
        return output._replace(reconstruction=self.target(images[mask].reshape(output.reconstruction.shape)))


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_reconstruction_is_the_clip(norm_pix: bool) -> None:
    """Patches land where and when they belong, visible ones are pasted back, and normalised targets are undone."""
    recipe = tiny(norm_pix_loss=norm_pix, channels=1)
    model = model_of(recipe).eval()
    model.__class__ = Oracle
    info = DatasetInfo(2, 1, (0.4,), (0.2,), ())
    clips = torch.randint(0, 256, (2, 8, 16, 16, 1), dtype=torch.uint8)
    named = panels.pictures(model, recipe, info, clips, 0.5)
    assert tuple(named) == ("clip", "reconstruction", "true loss", "predicted loss", "mask")
    pictures = np.stack(list(named.values()), axis=1)
    assert pictures.shape == (2, 5, 8, 16, 16, 3)
    assert (pictures[:, 1] == pictures[:, 0]).all()
    assert (pictures[:, 0] == clips.numpy()).all()
    hidden = (pictures[:, 4] == 127).all(-1).reshape(2, 8, 2, 8, 2, 8).all((3, 5)).reshape(2, 4, 2, 4)
    assert (hidden[:, :, 0] == hidden[:, :, 1]).all()  # a slot's two frames are masked alike
    assert (hidden[:, :, 0].sum(-1) == recipe.num_masked // 4).all()
    sheet = drawing.sheet(named, 2)
    assert sheet.shape[1] == 4 * (4 + 64) + 4
    with Image.open(io.BytesIO(drawing.animation(named))) as gif:
        assert (gif.n_frames, gif.info["loop"]) == (8, 0)  # type: ignore[attr-defined]


def test_a_video_run_from_pretraining_to_pictures_and_probes(tmp_path: Path) -> None:
    """Two updates on two ranks under ZeRO-3 with activation checkpointing, on prepared videos, as one rank makes them;
    then pictures, k-NN and, on two ranks again, a fine-tuning tested over several views."""
    run, one = tmp_path / "run", tmp_path / "one"
    videos = prepare_videos(video_folder(tmp_path / "videos", 9), tmp_path / "set")
    flags = (
        "--recipe",
        "hpm_video_demo",
        "--data_path",
        videos,
        "--channels",
        3,
        "--input_size",
        12,
        "--sampling_rate",
        1,
        "--tubelet_size",
        2,
        "--decoder_depth",
        1,
        "--decoder_dim",
        32,
        "--global_batch_size",
        4,
        "--epochs",
        1,
        "--warmup_epochs",
        0,
        "--log_every",
        1,
        "--activation_checkpointing",
    )
    zero3, zero1 = (
        ("--deepspeed_config", ROOT / "ds_configs" / f"{name}.json") for name in ("zero3_bf16", "zero1_bf16")
    )
    check_ranks("fasthpm.pretrain", *flags, *zero3, "--batch_size", 2, "--output_dir", run, ranks=2)
    dispatch(["pretrain", *map(str, (*flags, *zero1, "--batch_size", 4, "--output_dir", one, "--panel_every", 0))])
    # The ranks' shares make up the batch of one: halves of other samples would differ by much more.
    for ours, theirs in zip(read_metrics(run), read_metrics(one), strict=True):
        assert ours["reconstruction_loss"] == pytest.approx(theirs["reconstruction_loss"], rel=0.01)
    assert {path.suffix for path in (run / "panels").iterdir()} == {".png", ".gif"}
    assert (run / "model.safetensors").is_file()
    images = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload().Images("clips")
    assert images[-1].encoded_image_string[:4] == b"GIF8"
    for name in ("x.png", "x.gif"):
        dispatch(["visualize", str(run), "--num_images", "2", "-o", str(tmp_path / name)])
        assert (tmp_path / name).read_bytes()[:4] == {"x.png": b"\x89PNG", "x.gif": b"GIF8"}[name]
    paths = ("--train_path", videos, "--val_path", videos, "--batch_size", 4)
    dispatch(["knn", str(run), *map(str, paths), "--weights", "untrained", "student"])
    assert json.loads((run / "knn_student_mean.json").read_text())["pool"] == "mean"
    assert (run / "knn_untrained_mean.json").is_file()
    # Nine test videos: the second rank has a batch less.
    tune = ("--epochs", 1, "--global_batch_size", 8, "--test_views", "2x3", *zero3)
    check_ranks("fasthpm.probes.finetune", run, *paths, *tune, ranks=2)
    found = json.loads((run / "finetune" / "result.json").read_text())
    assert (found["protocol"], found["versions"]["world_size"]) == ("fine-tune, 1 epochs, 2x3 views", 2)
    assert found["accuracy"] * 9 / 100 == pytest.approx(round(found["accuracy"] * 9 / 100))
