"""The model: the published implementations' numbers, and its own fast paths against slow ones."""

import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import fasthpm
from fasthpm.checkpoint import load_reference
from fasthpm.errors import UserError
from fasthpm.model import HPMViT
from fasthpm.model_names import model_names
from tests.helpers import reference
from tests.helpers.golden import GOLDEN

CASES = {case["name"]: case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}
DTYPES = {"f32": torch.float32, "f64": torch.float64}


def golden_model(case: str, dtype: torch.dtype, **options: Any) -> tuple[HPMViT, dict[str, Tensor], dict[str, Any]]:
    """Our model with the published weights of a fixture, its tensors and its description."""
    tensors, meta = load_file(GOLDEN / f"{case}.safetensors"), CASES[case]
    config = {k: v for k, v in meta["config"].items() if k not in ("layernorm_eps", "norm_pix_loss")}
    model = HPMViT(**config, **options).to(dtype)
    state = {key[3:]: value.to(dtype) for key, value in tensors.items() if key.startswith("sd/")}
    load_reference(model, state, case.split("_")[0])
    return model, tensors, meta


def tolerance(meta: dict[str, Any], name: str, flat: bool = False) -> dict[str, float]:
    """rtol and atol of a fixture; constant patches amplify float32 rounding by 1/sqrt(1e-6)."""
    rtol, atol = meta["tolerance"][name]
    return {"rtol": rtol, "atol": max(atol, 2e-4) if flat and name == "f32" else atol}


def published_gradients(model: HPMViT) -> dict[str, Tensor]:
    """Gradients under the published names: the loss head's P*P*C rows each get 1/(P*P*C) of our single row's."""
    rows = model.patch_size**2 * model.in_chans
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in ("weight", "bias"):
        key = f"decoder_pred_losspred.{name}"
        if key in gradients:
            gradients[key] = (gradients[key] / rows).expand(rows, *gradients[key].shape[1:])
    return gradients


def check_gradients(
    model: HPMViT, tensors: dict[str, Tensor], meta: dict[str, Any], norm: Tensor, limits: dict[str, float], full: str
) -> None:
    """Total norm, and (where `full` names a group of the fixture) each tensor."""
    gradients = published_gradients(model)
    total = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients.values()))
    torch.testing.assert_close(total, norm.double(), **limits)
    keys = [key for key in tensors if full and key.startswith(full)]
    assert bool(keys) == bool(full)
    for key in keys:
        torch.testing.assert_close(gradients[key.removeprefix(full)], tensors[key], **limits)
    if full:
        for name, norm_of in meta["grad_l2_by_param_f64"].items():
            want = torch.tensor(norm_of, dtype=torch.float64)
            torch.testing.assert_close(gradients[name].double().norm(), want, rtol=limits["rtol"], atol=1e-10)


@pytest.mark.parametrize("name", DTYPES)
def test_published_hpm_forward(name: str) -> None:
    model, tensors, meta = golden_model("hpm_pixel", DTYPES[name])
    images, mask, limits = tensors["in/imgs"].to(DTYPES[name]), tensors["in/mask"].bool(), tolerance(meta, name)
    masked = int(mask[0].sum())
    with torch.no_grad():
        output = model(images, mask)
        torch.testing.assert_close(model.encode(images, mask), tensors[f"{name}/masked/latent"], **limits)
        torch.testing.assert_close(model.predict_loss(images), tensors[f"{name}/visible/loss_pred"], **limits)
    torch.testing.assert_close(output.reconstruction, tensors[f"{name}/masked/pix_pred"][:, -masked:], **limits)
    torch.testing.assert_close(output.predicted_difficulty, tensors[f"{name}/masked/loss_pred"][:, -masked:], **limits)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_published_hpm_losses_and_gradients(name: str, norm_pix: bool, kind: str) -> None:
    model, tensors, meta = golden_model("hpm_pixel", DTYPES[name], predict_loss=kind, norm_pix_loss=norm_pix)
    limits = tolerance(meta, name, flat=norm_pix)
    output = model(tensors["in/imgs"].to(DTYPES[name]), tensors["in/mask"].bool())
    output.loss.backward()
    group = f"{name}/norm_pix_{norm_pix}"
    torch.testing.assert_close(output.reconstruction_loss.detach(), tensors[f"{group}/rec_mean"], **limits)
    torch.testing.assert_close(output.per_patch_loss, tensors[f"{group}/rec_matrix"], **limits)
    # The released form adds 1e-6 inside its logarithms: at these scores that is below 1e-5 of the loss.
    close = {"rtol": max(limits["rtol"], 1e-5), "atol": max(limits["atol"], 1e-6)} if kind == "relative" else limits
    torch.testing.assert_close(output.difficulty_loss.detach(), tensors[f"{group}/learn_{kind}"], **close)
    full = "f64/grad/" if name == "f64" and kind == "relative" and not norm_pix else ""
    check_gradients(model, tensors, meta, tensors[f"{group}/grad_norm_{kind}"], close, full)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("ratio", [0.75, 0.6])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_published_mae(name: str, ratio: float, norm_pix: bool) -> None:
    options = {"predict_loss": "none", "norm_pix_loss": norm_pix}
    model, tensors, meta = golden_model("mae", DTYPES[name], **options)
    limits = tolerance(meta, name, flat=norm_pix)
    mask = tensors[f"in/mask_{ratio}"].bool()
    output = model(tensors["in/imgs"].to(DTYPES[name]), mask)
    output.loss.backward()
    group = f"{name}/r{ratio}"
    torch.testing.assert_close(output.loss.detach(), tensors[f"{group}/norm_pix_{norm_pix}/loss"], **limits)
    if ratio == 0.75:
        want = tensors[f"{group}/pred"][mask].reshape(output.reconstruction.shape)
        torch.testing.assert_close(output.reconstruction.detach(), want, **tolerance(meta, name))
    full = "f64/grad/" if name == "f64" and norm_pix and ratio == 0.75 else ""
    check_gradients(model, tensors, meta, tensors[f"{group}/norm_pix_{norm_pix}/grad_norm"], limits, full)


def small(**options: Any) -> HPMViT:
    """A rectangular four-channel model of 24 patches with all parameters moved off their initial values."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": (8, 12), "patch_size": 2, "in_chans": 4, "embed_dim": 16, "depth": 2}
    model = HPMViT(**sizes, num_heads=2, decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def slow_forward(model: HPMViT, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-patch loss, predicted difficulty and reconstruction of masked patches, computed for every token of one
    image at a time, with a real convolution, boolean indexing and no shortcut."""
    losses, difficulties, reconstructions = [], [], []
    for image, row in zip(images, mask, strict=True):
        weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
        grid = torch.nn.functional.conv2d(image[None], weight, bias, stride=model.patch_size)
        tokens = grid.flatten(2).transpose(1, 2)
        full = (slow_simmim if model.encoder_mask_tokens else slow_mae)(model, tokens, row)
        rec, dif = full, full
        for block in model.decoder_blocks:
            rec = block(rec)
        count = int(row.sum())
        prediction = model.decoder_pred(model.decoder_norm(rec))[:, -count:]
        target = reference.patches_of(image, model.patch_size)[row][None]
        if model.norm_pix_loss:
            target = torch.stack([reference.normalised_patch(p) for p in target[0]])[None]
        difference = prediction - target
        losses.append((difference**2 if model.pixel_loss == "mse" else difference.abs()).mean(-1))
        reconstructions.append(prediction)
        if model.predict_loss_kind == "none":
            difficulties.append(torch.zeros_like(losses[-1]))
            continue
        dif = model.decoder_embed_losspred(dif)
        for block in model.decoder_blocks_losspred:
            dif = block(dif)
        difficulties.append(model.decoder_pred_losspred(model.decoder_norm_losspred(dif))[:, -count:])
    return torch.cat(losses), torch.cat(difficulties), torch.cat(reconstructions)


def slow_mae(model: HPMViT, tokens: Tensor, row: Tensor) -> Tensor:
    """The decoders' input: visible patches through the encoder, then mask tokens."""
    hidden = tokens + model.pos_embed[:, 1:]
    hidden = torch.cat([model.cls_token + model.pos_embed[:, :1], hidden[:, ~row]], 1)
    for block in model.blocks:
        hidden = block(hidden)
    hidden = model.decoder_embed(model.norm(hidden))
    positions = model.decoder_pos_embed
    return torch.cat(
        [
            hidden[:, :1] + positions[:, :1],
            hidden[:, 1:] + positions[:, 1:][:, ~row],
            model.mask_token + positions[:, 1:][:, row],
        ],
        1,
    )


def slow_simmim(model: HPMViT, tokens: Tensor, row: Tensor) -> Tensor:
    """Mask tokens take the places of masked patches, in raster order, and all go through the encoder."""
    mixed = torch.where(row[None, :, None], model.mask_token, tokens) + model.pos_embed[:, 1:]
    hidden = torch.cat([model.cls_token + model.pos_embed[:, :1], mixed], 1)
    for block in model.blocks:
        hidden = block(hidden)
    hidden = model.norm(hidden)
    return torch.cat([hidden[:, :1], hidden[:, 1:][:, ~row], hidden[:, 1:][:, row]], 1)


SETTINGS: dict[str, dict[str, Any]] = {
    "hpm": {},
    "hpm-absolute": {"predict_loss": "absolute", "norm_pix_loss": True},
    "hpm-absolute-raw": {"predict_loss": "absolute", "absolute_standardize": False},
    "hpm-small-predictor": {"predictor_dim": 4, "predictor_depth": 1, "norm_pix_loss": True},
    "hpm-deep-predictor-l1": {"predictor_depth": 3, "pixel_loss": "l1"},
    "mae": {"predict_loss": "none"},
    "simmim": {"predict_loss": "none", "encoder_mask_tokens": True, "pixel_loss": "l1"},
    "simmim-hpm": {"encoder_mask_tokens": True, "pixel_loss": "l1", "predictor_depth": 1},
    "simmim-hpm-wide": {"encoder_mask_tokens": True, "predictor_dim": 16, "predict_loss": "absolute"},
}


@pytest.mark.parametrize("masked", [1, 12, 23])
@pytest.mark.parametrize("setting", SETTINGS)
def test_lean_forward_equals_slow_forward(masked: int, setting: str) -> None:
    """Values and all gradients, from one masked patch to one visible patch."""
    model = small(**SETTINGS[setting])
    images = torch.randn(3, 4, 8, 12, dtype=torch.float64)
    mask = torch.rand(3, 24).argsort(1) < masked
    output = model(images, mask, num_masked=masked)
    per_patch, predicted, reconstruction = slow_forward(model, images, mask)
    torch.testing.assert_close(output.reconstruction, reconstruction)
    torch.testing.assert_close(output.per_patch_loss, per_patch.detach())
    torch.testing.assert_close(output.predicted_difficulty, predicted)
    slow = {
        "relative": reference.ranking_loss,
        "absolute": lambda p, a: reference.absolute_loss(p, a, model.absolute_standardize),
        "none": lambda p, a: p.sum() * 0,
    }[model.predict_loss_kind]
    total = reference.total(per_patch.mean(), slow(predicted, per_patch.detach()))
    torch.testing.assert_close(output.loss, total)
    parameters = list(model.parameters())
    fast, want = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (output.loss, total))
    for a, b in zip(fast, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name not in ("mae", "simmim")])
def test_every_loss_predictor_sees_all_patches(setting: str) -> None:
    """The teacher's forward is the student's with nothing masked, head by head."""
    model = small(**SETTINGS[setting])
    images = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    tokens = model.encode(images, torch.zeros(2, 24, dtype=torch.bool))
    if not model.encoder_mask_tokens:
        tokens = model.decoder_embed(tokens) + model.decoder_pos_embed
    hidden = model.decoder_embed_losspred(tokens)
    for block in model.decoder_blocks_losspred:
        hidden = block(hidden)
    want = model.decoder_pred_losspred(model.decoder_norm_losspred(hidden))[:, 1:]
    torch.testing.assert_close(model.predict_loss(images), want)


def test_simmims_encoder_gives_the_visible_tokens_alone() -> None:
    """`encode` with a mask: what the loss sees of the visible patches, and no mask token."""
    model = small(**SETTINGS["simmim"])
    images = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    mask = torch.rand(2, 24).argsort(1) < 14
    tokens = torch.nn.functional.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=2)
    want = [slow_simmim(model, t[None], row)[0, :11] for t, row in zip(tokens.flatten(2).mT, mask, strict=True)]
    torch.testing.assert_close(model.encode(images, mask), torch.stack(want))
    assert not torch.allclose(model.encode(images)[:, 0], model.encode(images, mask)[:, 0])


def test_decoders_take_the_papers_depths_and_widths() -> None:
    for depth in (1, 2, 4, 8, 12):
        model = small(predictor_depth=depth)
        assert (len(model.decoder_blocks), len(model.decoder_blocks_losspred)) == (2, depth)
    with torch.device("meta"):
        for width in (128, 256, 512, 1024):
            model = fasthpm.create_model("hpm_vit_base_patch16_224", decoder_embed_dim=width)
            assert model.decoder_pred_losspred.weight.shape == (1, width)
            model = fasthpm.create_model("hpm_vit_base_patch16_224", predictor_dim=width)
            assert (model.mask_token.shape[-1], model.decoder_pred_losspred.weight.shape[-1]) == (512, width)


def test_patchify_is_raster_order_and_inverts() -> None:
    model = small()
    images = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    patches = model.patchify(images)
    torch.testing.assert_close(patches[1], reference.patches_of(images[1], 2))
    torch.testing.assert_close(model.unpatchify(patches), images)


def test_teacher_never_touches_the_reconstructor() -> None:
    model = small()
    for module in (model.decoder_blocks, model.decoder_norm, model.decoder_pred):
        module.register_forward_pre_hook(lambda *_: pytest.fail("the reconstructor ran"))
    model.predict_loss(torch.randn(1, 4, 8, 12, dtype=torch.float64))


def test_difficulty_is_float32_in_a_bfloat16_model() -> None:
    model = small().bfloat16()
    assert model.predict_loss(torch.randn(1, 4, 8, 12)).dtype == torch.float32


def test_every_name_is_registered_with_timm() -> None:
    assert set(model_names()) <= set(timm.list_models())
    model = timm.create_model("hpm_vit_nano_patch4_28", in_chans=1)
    assert isinstance(model, HPMViT)
    assert timm.create_model("mae_vit_nano_patch4_28", in_chans=1).predict_loss_kind == "none"
    simmim = timm.create_model("simmim_vit_nano_patch4_28", in_chans=1)
    assert (simmim.encoder_mask_tokens, simmim.pixel_loss, simmim.predict_loss_kind) == (True, "l1", "none")


@pytest.mark.parametrize(("size", "millions"), [("base", 137.27), ("large", 354.85), ("huge", 682.14)])
def test_published_parameter_counts(size: str, millions: float) -> None:
    """The published count less the loss head's rows that ours averages."""
    with torch.device("meta"):
        name = next(n for n in model_names() if n.startswith(f"hpm_vit_{size}"))
        model = fasthpm.create_model(name)
    rows = model.patch_size**2 * 3
    count = sum(p.numel() for p in model.parameters()) + (rows - 1) * 513
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'hpm_vit_base_patch16_224'"):
        fasthpm.create_model("hpm_vit_bas_patch16_224")
    with pytest.raises(UserError, match="not a multiple of patch_size 16"):
        fasthpm.create_model("hpm_vit_tiny_patch16_224", img_size=100)
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(ValueError, match=r"same number of masked patches, got \[1, 0\]"):
        small().encode(torch.randn(2, 4, 8, 12), mask)
    with pytest.raises(UserError, match="unexpected \\['extra'\\]"):
        load_reference(small(), {**small().state_dict(), "extra": torch.zeros(1)}, "hpm")


def test_mae_weights_leave_the_loss_predictor_alone() -> None:
    model, donor = small(), small(predict_loss="none")
    with torch.no_grad():
        donor.cls_token.fill_(3)
    before = model.decoder_pred_losspred.weight.clone()
    load_reference(model, donor.state_dict(), "mae")
    assert torch.equal(model.cls_token, donor.cls_token)
    assert torch.equal(model.decoder_pred_losspred.weight, before)


def test_targets_of_bands_are_normalised_band_by_band() -> None:
    """norm_pix_channels: a loop over patches and channels; bands of another scale weigh no more than others."""
    model = small(norm_pix_loss=True, norm_pix_channels=True)
    patches = torch.randn(2, 4, model.patch_dim, dtype=torch.float64) * torch.tensor([1.0, 50.0, 0.1, 1.0]).repeat(
        model.patch_dim // 4
    )
    found = model.target(patches)
    for row in range(2):
        for patch in range(4):
            for band in range(4):
                values = patches[row, patch, band::4]
                want = (values - values.mean()) / values.std()
                torch.testing.assert_close(found[row, patch, band::4], want, rtol=1e-4, atol=1e-5)
    together = small(norm_pix_loss=True).target(patches)
    contrast = [target[..., 2::4].std(dim=-1).max() for target in (together, found)]  # of the faint band
    assert contrast[0] < 0.1 < 0.9 < contrast[1]
