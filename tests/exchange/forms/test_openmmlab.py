"""The export form of mmseg, whose table of names and shapes is compared with a reading of its classes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm.__main__ import dispatch
from fasthpm.checkpoint.weights import load_weights
from fasthpm.exchange import exporting
from fasthpm.exchange.forms import openmmlab
from fasthpm.layers import relative_index
from fasthpm.model import HPMViT
from tests.helpers import openmmlab as openmmlab_twin
from tests.helpers.exports import close, export, pictures, run_with


@torch.no_grad()
def test_mmsegs_computation_over_its_names_is_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The library does not install; what it computes, spelled out in tests/helpers, gives our blocks' outputs."""
    run, model = run_with(tmp_path / "run")
    state = export(run, "mmseg", tmp_path / "mmseg.pth", capsys)
    ours: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *given: ours.append(given[-1])) for block in model.blocks]
    model.encode(pictures(model))
    for hook in hooks:
        hook.remove()
    for theirs, each in zip(openmmlab_twin.mae(state, pictures(model), heads=4), ours, strict=True):
        close(theirs, each)


def test_the_command_claims_no_more_than_was_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = run_with(tmp_path / "run")
    dispatch(["export", str(run), "--format", "mmseg", "-o", str(tmp_path / "mmseg.pth")])
    out = capsys.readouterr().out
    assert "names and shapes are mmseg's" in out
    assert "mmseg itself was not run" in out
    assert "agrees" not in out


def test_the_table_of_a_base_model() -> None:
    """mmseg's MAE-B of 224 pixels: 12 layers of 16 tensors, and 4 (from reading its classes)."""
    arguments = {
        "embed_dim": 768,
        "num_heads": 12,
        "patch_size": 16,
        "img_size": [224, 224],
        "in_chans": 3,
        "depth": 12,
    }
    table = openmmlab.mmseg_shapes(arguments, mlp=3072)
    assert len(table) == 12 * 16 + 4
    assert not [name for name in table if re.search(r"backbone|blocks|norm|mlp", name)]
    assert table["layers.11.attn.relative_position_bias_table"] == (27 * 27 + 3, 12)
    assert table["layers.0.attn.relative_position_index"] == (197, 197)
    assert table["layers.0.ffn.layers.1.weight"] == (768, 3072)
    assert table["pos_embed"] == (1, 197, 768)


def test_the_index_of_two_by_three_patches() -> None:
    """Every pair of patches with the same offset shares a row; cls has the last three."""
    index = relative_index(2, 3)
    places = [(row, column) for row in range(2) for column in range(3)]
    for a, (row, column) in enumerate(places):
        for b, (other, beside) in enumerate(places):
            assert index[1 + a, 1 + b] == (row - other + 1) * 5 + column - beside + 2
    assert index[0].tolist() == [17, *[15] * 6]
    assert index[1:, 0].tolist() == [16] * 6


WRONG: dict[str, Any] = {
    "another name": lambda state: state.update({"layers.1.norm1.weight": state.pop("layers.1.ln1.weight")}),
    "a prefix": lambda state: state.update({"backbone.cls_token": state.pop("cls_token")}),
    "no bias": lambda state: state.pop("layers.2.attn.qkv.bias"),
    "another shape": lambda state: state.update(cls_token=state["cls_token"][0]),
    "gamma": lambda state: state["layers.0.gamma_2"].mul_(0.1),
    "table": lambda state: state["layers.3.attn.relative_position_bias_table"].add_(1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_mmseg_would_not_take_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    run, model = run_with(tmp_path / "run")
    original = openmmlab.mmseg_state

    def state(model: HPMViT) -> dict[str, Tensor]:
        made = original(model)
        WRONG[wrong](made)
        return made

    monkeypatch.setattr(openmmlab, "mmseg_state", state)
    with pytest.raises(RuntimeError, match=r"does not have these names or shapes|changes what the encoder computes"):
        exporting.export_weights(model, load_weights(run)[1], tmp_path / "mmseg.pth", "mmseg")
    assert not (tmp_path / "mmseg.pth").exists()
