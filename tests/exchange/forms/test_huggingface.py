"""Export forms of transformers."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasthpm.checkpoint.weights import load_weights
from fasthpm.exchange import exporting
from fasthpm.exchange.forms import HuggingFaceBEiT, HuggingFaceMAE
from fasthpm.exchange.forms.huggingface import levels
from fasthpm.model import create_model
from fasthpm.model_names import SIZES
from tests.helpers.exports import close, export, pictures, run_with
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
