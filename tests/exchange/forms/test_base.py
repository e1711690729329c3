"""What every form must keep, and what they share."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from fasthpm.exchange import exporting, forms
from fasthpm.exchange.forms import base
from fasthpm.files import read_file
from tests.helpers.exports import OWN, loaded, run_with
from tests.helpers.fast_modes import doubled


@pytest.mark.parametrize("form", [name for name in forms.FORMS if name != "onnx"])  # test_onnx_graph.py
def test_the_line_that_loads_it_runs_as_it_is(tmp_path: Path, form: str) -> None:
    """In a fresh name space, also for a path with quotes and blanks in it."""
    run, model = run_with(tmp_path / "run", **OWN.get(form, {}))
    path = tmp_path / 'it\'s a "folder"' / forms.FORMS[form].default
    exporting.export_weights(model, load_weights(run)[1], path, form)
    line = forms.FORMS[form].usage(path)
    assert "\n" not in line
    assert isinstance(loaded(line), dict if form in ("safetensors", "mmseg") else nn.Module)


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="there is a form 'timm' already"):
        forms.register(forms.Timm())


def test_what_forms_were_called_before_is_still_there() -> None:
    for name in ("Form", "register", "FORMS", "library", "encoder_of", "timm_arguments"):
        assert getattr(forms, name) is getattr(base, name)


def test_block_outputs_are_those_of_the_encoder() -> None:
    model = doubled()
    patches = torch.randn(2, model.num_patches, model.patch_dim, dtype=torch.float64)
    outputs = base.block_outputs(model, patches)
    assert len(outputs) == len(model.blocks) + 1
    torch.testing.assert_close(outputs[-1], model.norm(outputs[-2]), rtol=0, atol=0)
    torch.testing.assert_close(outputs[1], model.blocks[1](outputs[0]), rtol=0, atol=0)
    assert not model.blocks[0]._forward_hooks


def test_a_library_of_no_extra_is_named_itself() -> None:
    with pytest.raises(UserError, match=r"this needs no_such_package, .*; install it: pip install 'no_such_package'"):
        base.library("no_such_package", "no_such_package")


def test_torch_files_keep_their_texts(tmp_path: Path) -> None:
    """And other people's entries of that name are no texts of ours."""
    base.write_pth({"a": torch.ones(2)}, "model", {"mean": "[0.5]"}, tmp_path / "x.pth")
    content, metadata = read_file(tmp_path / "x.pth")
    assert torch.equal(content["model"]["a"], torch.ones(2))
    assert metadata == {"mean": "[0.5]"}
    for other in (torch.ones(1), {"mean": 3, 4: "x"}, "text"):
        torch.save({"model": {}, "fasthpm": other}, tmp_path / "y.pth")
        assert read_file(tmp_path / "y.pth")[1] == {}
