"""The encoder as an ONNX graph, run by onnxruntime."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fasthpm import layers
from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from fasthpm.exchange import exporting
from fasthpm.exchange.forms import Onnx
from fasthpm.model import create_model
from fasthpm.recipes import debug
from tests.helpers.disk import fill, mounted
from tests.helpers.exports import close, export, pictures, run_with
from tests.helpers.videos import video_run


def run_graph(session: Any, images: Tensor) -> Tensor:
    return torch.from_numpy(session.run(["tokens"], {"images": images.numpy()})[0])


@torch.no_grad()
def test_any_number_of_images_and_any_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two channels, no square; also where kernels of attention were chosen before, which are kept."""
    import onnx

    run, model = run_with(tmp_path / "run", input_size="8x12", channels=2)
    chosen = layers.Attended((2, 4, 7, 32), (2, 4, 7, 32), torch.float32, False)
    monkeypatch.setitem(layers.PINNED, chosen, SDPBackend.MATH)
    session = export(run, "onnx", tmp_path / "it's.onnx", capsys)
    assert {chosen: SDPBackend.MATH} == layers.PINNED
    for count in (1, 2, 5):
        close(run_graph(session, pictures(model, count)), model.encode(pictures(model, count)))
    graph = onnx.load(tmp_path / "it's.onnx")
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", 18)]
    properties = {each.key: each.value for each in graph.metadata_props}
    assert properties["model"] == "hpm_vit_nano_patch4_28"
    assert properties["weights"] == '"student"'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it's.onnx", "run"]  # no file of weights beside it


@torch.no_grad()
def test_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = video_run(tmp_path / "run", input_size="16x24")
    session = export(run, "onnx", tmp_path / "clips.onnx", capsys)
    close(run_graph(session, pictures(model, 3)), model.encode(pictures(model, 3)))


@torch.no_grad()
def test_a_graph_may_err_as_float32_does_and_no_more(tmp_path: Path) -> None:
    """What is allowed follows our own encoder in float32; that more is refused, test_exporting.py says."""
    _, model = run_with(tmp_path / "run")
    images = pictures(model).double()
    ours, single = model.double().encode(images), model.float().encode(images.float())
    allowed = Onnx().allowed(model.double(), images, torch.zeros(1))
    assert allowed == pytest.approx(8 * float((single - ours).abs().max() / ours.abs().max()))
    assert 1e-6 < allowed < 3e-5
    assert model.cls_token.dtype == torch.float64


def test_a_graph_that_no_file_can_hold_is_refused() -> None:
    with torch.device("meta"):
        huge = create_model("mae_vit_large_patch16_224", depth=56)
    assert Onnx().refusal(huge) == "weights below 2 GiB, this encoder's are 2.63 GiB"
    assert not Onnx().refusal(create_model("mae_vit_nano_patch4_28"))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_packages_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    run, model = run_with(tmp_path / "run")
    if package == "onnxruntime":  # asked for when the graph is there
        monkeypatch.setattr(Onnx, "write", lambda self, model, recipe, metadata, path: path.touch())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"this needs {package}, .*; install it: pip install 'fasthpm\[onnx\]'"):
        exporting.export_weights(model, load_weights(run)[1], tmp_path / "x.onnx", "onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """Which `export_weights` makes one line of; the writer's own error would be a traceback."""
    model = create_model("mae_vit_nano_patch4_28", depth=1, in_chans=1).eval()
    with mounted(tmp_path / "disk", 1) as disk:
        fill(disk, leave=1 << 12)
        with pytest.raises(OSError, match="No space left on device"):
            Onnx().write(model, debug(), {}, disk / "x.onnx")
