"""Export forms of transformers."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from fasthpm.exchange import exporting
from fasthpm.exchange.forms import HuggingFaceBEiT, HuggingFaceMAE, encoder_of
from fasthpm.exchange.forms.huggingface import levels
from fasthpm.model import create_model
from fasthpm.model_names import SIZES
from tests.helpers.exports import OWN, close, export, pictures, run_with
from tests.helpers.fast_modes import doubled


def test_a_cross_decoder_is_not_exported_as_one_of_another_kind() -> None:
    form = HuggingFaceMAE()
    assert "self attention in the decoder" in form.refusal(doubled(decoder_attention="cross"))
    assert not form.refusal(doubled())


def test_the_levels_are_mmsegs_and_beits() -> None:
    assert levels(12) == [4, 6, 8, 12]  # blocks 3, 5, 7, 11 from 0
    assert levels(24) == [8, 12, 16, 24]  # blocks 7, 11, 15, 23
    assert all(len(set(levels(size["depth"]))) == 4 for size in SIZES.values())
    shallow = create_model("hpm_vit_nano_patch4_28", depth=3)
    assert HuggingFaceBEiT().refusal(shallow) == "4 levels, this model has 3 blocks"


equal = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_beits_feature_maps_are_our_blocks_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the printed line; block by block, taken here by hooks on our encoder. Twelve blocks, four of them levels."""
    sizes = {"model": "hpm_vit_tiny_patch4_28", "decoder_depth": 1}
    run, model = run_with(tmp_path / "run", **sizes)
    backbone = export(run, "hf_beit", tmp_path / "hf", capsys).double().eval()
    model, images, found = model.double(), pictures(model).double(), list[Tensor]()
    hooks = [block.register_forward_hook(lambda *given: found.append(given[-1])) for block in model.blocks]
    last = model.encode(images)
    maps = backbone(images).feature_maps
    assert backbone.out_indices == [4, 6, 8, 12]
    for level, each in zip((4, 6, 8, 12), maps, strict=True):
        equal(each.flatten(2).transpose(1, 2), found[level - 1][:, 1:])
    equal(backbone.beit(images).last_hidden_state, last)
    for hook in hooks:
        hook.remove()


def test_upernet_on_it_as_the_documentation_says(tmp_path: Path) -> None:
    """The lines of docs/own_images.md, run; a gradient reaches the encoder."""
    run, model = run_with(tmp_path / "run", input_size="24")
    exporting.export_weights(model, load_weights(run)[1], tmp_path / "hf_beit", "hf_beit")
    text = (Path(__file__).parents[3] / "docs" / "own_images.md").read_text()
    (lines,) = [code for code in text.split("```") if code.startswith("\nimport transformers")]
    namespace: dict[str, object] = {}
    exec(lines.replace('"hf_beit"', repr(str(tmp_path / "hf_beit"))), namespace)
    upernet = namespace["model"]
    logits = upernet.train()(torch.randn(2, 3, 48, 48)).logits  # type: ignore[attr-defined]
    assert logits.shape == (2, 150, 48, 48)
    logits.square().mean().backward()
    weight = upernet.backbone.beit.layers[0].attention.q_proj.weight  # type: ignore[attr-defined]
    assert float(weight.grad.abs().max()) > 0
    close(weight.detach(), model.blocks[0].attn.qkv.weight[: model.embed_dim].detach())  # type: ignore[union-attr, index]


BEIT = OWN["hf_beit_mim"]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "relative"])
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_tokens_of_masked_patches_are_transformers_beits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], positions: str, layer_scale: float
) -> None:
    """By the printed line, with random masks; positions and LayerScale go along as they are."""
    run, model = run_with(tmp_path / "run", **BEIT, positions=positions, layer_scale=layer_scale)
    theirs = export(run, "hf_beit_mim", tmp_path / "out", capsys)
    images, mask = pictures(model), torch.rand(2, 9).argsort(dim=1) < 4
    want = model(images, mask, target=torch.zeros(2, 9, dtype=torch.int64)).reconstruction
    close(theirs(images, bool_masked_pos=mask).logits[mask].reshape(want.shape), want)
    assert theirs.config.vocab_size == 9


@torch.no_grad()
def test_a_plain_vit_takes_layer_scale_multiplied_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = run_with(tmp_path / "run", **BEIT, positions="learned", layer_scale=0.1)
    theirs = export(run, "timm", tmp_path / "encoder.safetensors", capsys)
    images = pictures(model)
    close(theirs.forward_features(images), model.encode(images))


def test_relative_positions_leave_in_two_forms_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = run_with(tmp_path / "run", **BEIT, positions="relative")
    with pytest.raises(UserError, match=r"timm has no relative positions, .* use one of hf_beit_mim, safetensors"):
        export(run, "timm", tmp_path / "encoder.safetensors", capsys)
    with pytest.raises(UserError, match="which plain vision transformers lack"):
        encoder_of(model)
    exporting.export_weights(model, load_weights(run)[1], tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="a head of tokens, this model's is of pixels"):
        export(run_with(tmp_path / "mae", model="simmim_vit_nano_patch4_28", predict_loss="none", mask_policy="random",
                        norm_pix_loss=False)[0], "hf_beit_mim", tmp_path / "no", capsys)  # fmt: skip


@torch.no_grad()
def test_twelve_channels_by_the_printed_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The encoder's tokens; and reconstructions, for a mask that transformers' noise draws."""
    run, model = run_with(tmp_path / "run", channels=12, data_path="")
    images = pictures(model)
    vit = export(run, "hf_vit", tmp_path / "vit", capsys).eval()
    close(vit(images).last_hidden_state, model.encode(images))
    mae = export(run, "hf_vitmae", tmp_path / "mae", capsys).eval()
    found = mae(images, noise=torch.arange(9.0).expand(2, 9))
    want = model(images, found.mask.bool()).reconstruction
    close(found.logits[found.mask.bool()].reshape(want.shape), want)
