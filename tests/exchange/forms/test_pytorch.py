"""Export forms of timm, and MAE's own."""

from pathlib import Path
from typing import Any

import pytest
import timm.models
import torch
from safetensors.torch import load_file
from torch import Tensor

from fasthpm.checkpoint.weights import load_weights
from fasthpm.exchange import exporting, forms
from fasthpm.exchange.forms import TimmSAM, pytorch
from fasthpm.model import HPMViT
from tests.helpers.exports import close, export, loaded, pictures, run_with
from tests.helpers.published import run_import

PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


@torch.no_grad()
@pytest.mark.parametrize(("size", "channels"), [("12", 3), ("8x20", 1)])
def test_maes_file_is_read_by_timm(
    tmp_path: Path, size: str, channels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it holds is what MAE's scripts, detectron2 and beit2mmseg ask for by name."""
    run, model = run_with(tmp_path / "run", input_size=size, channels=channels)
    vit = export(run, "mae", tmp_path / "mae.pth", capsys).eval()
    close(vit.forward_features(pictures(model)), model.encode(pictures(model)))
    state = torch.load(tmp_path / "mae.pth", weights_only=True)["model"]
    blocks = [f"blocks.{n}.{m}.{p}" for n in range(4) for m in PARTS for p in ("weight", "bias")]
    stem = ["patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    assert sorted(state) == sorted(["cls_token", "pos_embed", *stem, *blocks])
    assert state["pos_embed"].shape == (1, 1 + model.num_patches, 128)
    assert {value.dtype for value in state.values()} == {torch.float32}


@torch.no_grad()
def test_maes_file_of_a_named_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model": "hpm_vit_tiny_patch16_224", "input_size": "224", "patch_size": 16, "decoder_depth": 1}
    run, model = run_with(tmp_path / "run", **sizes)
    vit = export(run, "mae", tmp_path / "mae.pth", capsys).eval()
    assert forms.FORMS["mae"].usage(tmp_path / "mae.pth").startswith("import timm; model = timm.create_model(")
    close(vit(pictures(model)), model.encode(pictures(model))[:, 0])


def test_maes_file_comes_back_with_its_statistics(tmp_path: Path) -> None:
    """Three channels, but not ImageNet's mean: who imports it again must not think so."""
    run, model = run_with(tmp_path / "run")
    info = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0]}
    exporting.export_weights(model, load_weights(run)[1], tmp_path / "mae.pth", "mae", info)
    run_import(tmp_path / "mae.pth", tmp_path / "back", "--encoder_only")
    back, _ = load_weights(tmp_path / "back")
    assert back.pixels is not None
    assert (back.pixels.mean, back.pixels.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
    torch.testing.assert_close(back.encode(pictures(model)), model.encode(pictures(model)), rtol=0, atol=0)


def without_cls(model: HPMViT, images: Tensor) -> Tensor:
    """Our encoder's blocks on the patches alone, spelled out."""
    tokens = model.patch_embed(model.patchify(images)) + model.pos_embed[:, 1:]
    for block in model.blocks:
        tokens = block(tokens)
    return model.norm(tokens)


@torch.no_grad()
@pytest.mark.parametrize(("size", "channels"), [("12", 3), ("8x20", 2)])
def test_samvit_is_the_encoder_without_cls(
    tmp_path: Path, size: str, channels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = run_with(tmp_path / "run", input_size=size, channels=channels)
    vit = export(run, "timm_samvit", tmp_path / "sam.safetensors", capsys).eval()
    images = pictures(model)
    close(vit.forward_features(images).flatten(2).transpose(1, 2), without_cls(model, images))
    table = load_file(tmp_path / "sam.safetensors")["pos_embed"]
    assert table.shape == (1, *model.grid_size, 128)
    assert torch.equal(table.flatten(1, 2), model.pos_embed[:, 1:])
    assert {block.norm1.eps for block in vit.blocks} == {1e-6}


@torch.no_grad()
def test_samvit_with_vitdets_windows_takes_the_same_weights(tmp_path: Path) -> None:
    """Windows of two by two patches in an image of four by four, one global block: against blocks on cut windows."""
    run, model = run_with(tmp_path / "run", input_size="16")
    exporting.export_weights(model, load_weights(run)[1], tmp_path / "sam.safetensors", "timm_samvit")
    arguments = forms.metadata_of(tmp_path / "sam.safetensors", "timm_samvit")
    arguments |= {"window_size": 2, "global_attn_indexes": (1,)}
    vit = timm.models.VisionTransformerSAM(**arguments).eval()
    vit.load_state_dict(load_file(tmp_path / "sam.safetensors"))
    images = pictures(model)
    tokens = (model.patch_embed(model.patchify(images)) + model.pos_embed[:, 1:]).unflatten(1, (4, 4))
    for number, block in enumerate(model.blocks):
        if number == 1:
            tokens = block(tokens.flatten(1, 2)).unflatten(1, (4, 4))
            continue
        whole = torch.empty_like(tokens)
        for row in (0, 2):
            for column in (0, 2):
                window = tokens[:, row : row + 2, column : column + 2].flatten(1, 2)
                whole[:, row : row + 2, column : column + 2] = block(window).unflatten(1, (2, 2))
        tokens = whole
    close(vit.forward_features(images).permute(0, 2, 3, 1), model.norm(tokens))


def test_samvits_own_eps_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = run_with(tmp_path / "run")
    original = pytorch.samvit_arguments

    def without_norm(model: HPMViT) -> dict[str, Any]:
        return {key: value for key, value in original(model).items() if key != "norm_layer"}

    monkeypatch.setattr(pytorch, "samvit_arguments", without_norm)
    with pytest.raises(RuntimeError, match="timm's outputs differ from ours by"):
        exporting.export_weights(model, load_weights(run)[1], tmp_path / "sam.safetensors", "timm_samvit")


def test_the_line_says_samvits_eps_in_full(tmp_path: Path) -> None:
    run, model = run_with(tmp_path / "run")
    exporting.export_weights(model, load_weights(run)[1], tmp_path / "sam.safetensors", "timm_samvit")
    line = TimmSAM().usage(tmp_path / "sam.safetensors")
    assert "norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-06)" in line
    assert {block.norm2.eps for block in loaded(line).blocks} == {1e-6}
    assert forms.metadata_of(tmp_path / "sam.safetensors", "timm_samvit")["norm_layer"] is None
