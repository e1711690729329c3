"""Weights that leave for other libraries: the same outputs on both sides, or a refusal."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasthpm.__main__ import dispatch
from fasthpm.checkpoint import weights
from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from fasthpm.exchange import exporting, forms
from fasthpm.exchange.forms import huggingface, ours
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from tests.helpers.exports import OWN, close, loaded, pictures, run_with
from tests.helpers.published import run_import
from tests.helpers.runs import away, recipe_in, run_of
from tests.helpers.videos import video_run


@torch.no_grad()
@pytest.mark.parametrize(("size", "channels"), [("12", 3), ("8x20", 1)])
def test_timm_and_hugging_face_encoders(tmp_path: Path, size: str, channels: int) -> None:
    """What a user writes to load the file; also rectangles and other channels."""
    import transformers

    run, model = run_with(tmp_path / "run", input_size=size, channels=channels)
    images = pictures(model)
    dispatch(["export", str(run), "-o", str(tmp_path / "new" / "encoder.safetensors")])
    vit = timm.models.VisionTransformer(**forms.metadata_of(tmp_path / "new/encoder.safetensors", "timm")).eval()
    vit.load_state_dict(load_file(tmp_path / "new/encoder.safetensors"))
    close(vit.forward_features(images), model.encode(images))
    dispatch(["export", str(run), "--format", "hf_vit", "-o", str(tmp_path / "hf")])
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    close(theirs(images).last_hidden_state, model.encode(images))


@torch.no_grad()
def test_timm_names_are_suggested_where_they_fit(tmp_path: Path) -> None:
    sizes = {"model": "hpm_vit_tiny_patch16_224", "input_size": "224", "patch_size": 16, "decoder_depth": 1}
    _, model = run_with(tmp_path / "run", **sizes)
    exporting.export_weights(model, load_weights(tmp_path / "run")[1], tmp_path / "tiny.safetensors")
    vit = loaded(forms.FORMS["timm"].usage(tmp_path / "tiny.safetensors")).eval()
    close(vit(pictures(model)), model.encode(pictures(model))[:, 0])


@torch.no_grad()
def test_torchvision_encoder(tmp_path: Path) -> None:
    import torchvision

    run, model = run_with(tmp_path / "run")
    dispatch(["export", str(run), "--format", "torchvision", "-o", str(tmp_path / "tv.safetensors")])
    vit = torchvision.models.VisionTransformer(
        image_size=12, patch_size=4, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=512
    ).eval()
    vit.heads = nn.Identity()
    vit.load_state_dict(load_file(tmp_path / "tv.safetensors"))
    images = pictures(model)
    close(vit(images), model.encode(images)[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("method", ["hpm", "mae"])
def test_hugging_face_mae(tmp_path: Path, method: str) -> None:
    """Encoder, reconstructor, target and mask ratio; the loss predictor stays behind."""
    import transformers

    changes = (
        {} if method == "hpm" else {"model": "mae_vit_nano_patch4_28", "predict_loss": "none", "mask_policy": "random"}
    )
    run, model = run_with(tmp_path / "run", mask_ratio=0.6, **changes)
    dispatch(["export", str(run), "--format", "hf_vitmae", "-o", str(tmp_path / "hf")])
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf").eval()
    images = pictures(model)
    noise = torch.rand(2, 9, generator=torch.Generator().manual_seed(2))
    out = theirs(images, noise=noise)
    ours = model(images, out.mask.bool())
    assert out.mask.sum() == 2 * 6
    close(out.logits[out.mask.bool()].reshape(ours.reconstruction.shape), ours.reconstruction)
    close(out.loss, ours.reconstruction_loss)


def test_plain_file_comes_back_as_the_same_run(tmp_path: Path) -> None:
    """Without a word about heads or targets: the recipe travels in the file."""
    run, model = run_with(tmp_path / "run", decoder_heads=2)
    dispatch(["export", str(run), "--format", "safetensors", "-o", str(tmp_path / "all.safetensors")])
    run_import(tmp_path / "all.safetensors", tmp_path / "back")
    again, recipe = load_weights(tmp_path / "back")
    assert recipe == load_weights(run)[1]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_the_help_lists_every_format_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        exporting.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, form in forms.FORMS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(form.summary)
        assert len(line) <= 110


VIDEO = OWN["hf_videomae"]


@pytest.mark.parametrize("form", forms.FORMS)
def test_a_difference_leaves_no_file(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight that is off by a ten-thousandth on its way out is found in every form."""
    _, model = run_with(tmp_path / "run", **OWN.get(form, {}))
    recipe = load_weights(tmp_path / "run")[1]
    kind, output = type(forms.FORMS[form]), tmp_path / "out" / forms.FORMS[form].default

    def off(self: forms.Form, model: HPMViT, *rest: Any) -> None:
        model = copy.deepcopy(model)
        model.blocks[2].norm2.bias.data[3] += 1e-4  # type: ignore[union-attr, operator, index]
        original(self, model, *rest)

    original = kind.write
    monkeypatch.setattr(kind, "write", off)
    with pytest.raises(RuntimeError, match="outputs differ from ours by"):
        exporting.export_weights(model, recipe, output, form)
    assert not list(output.parent.iterdir())
    monkeypatch.setattr(kind, "write", original)
    if form != "onnx":  # test_onnx_graph.py
        assert exporting.export_weights(model, recipe, output, form) < 1e-12


KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {  # models, and the forms that have none like them
    "video": (VIDEO, {"timm", "torchvision", "hf_vit", "hf_vitmae", "mae", "timm_samvit", "hf_beit", "mmseg"}),
    "channels": ({"channels": 2}, {"torchvision", "hf_videomae"}),
    "no square": ({"input_size": "8x12"}, {"torchvision", "hf_vitmae", "hf_videomae", "hf_beit", "mmseg"}),
    "cross": ({"decoder_attention": "cross"}, {"hf_vitmae", "hf_videomae"}),
    "simmim": (
        {"model": "simmim_vit_nano_patch4_28", "predict_loss": "none", "mask_policy": "random"},
        {"hf_vitmae", "hf_videomae"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [form for form in forms.FORMS if form != "onnx"])  # test_onnx_graph.py has that
def test_every_kind_of_model_leaves_or_is_refused_in_a_line(tmp_path: Path, kind: str, form: str) -> None:
    changes, refused = KINDS[kind]
    refused = refused | {"hf_beit_mim"}  # which takes nothing but a head of tokens
    run, model = run_with(tmp_path / "run", **changes)
    output = tmp_path / forms.FORMS[form].default
    if form not in refused:
        assert exporting.export_weights(model, load_weights(run)[1], output, form) < 1e-12
        return
    with pytest.raises(UserError, match=rf"--format {form} (needs|is not for) .+[;:] use [^\n]+$"):
        exporting.export_weights(model, load_weights(run)[1], output, form)
    assert not output.exists()


class Off(forms.Form):
    """A library whose outputs are ours but for one, which is off by `error`."""

    name, library, error = "off", "a library", 0.0

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        path.write_text(json.dumps(metadata))

    def ours(self, model: HPMViT, images: Tensor, mask: Tensor) -> Tensor:
        return torch.linspace(-2, 4, 7, dtype=torch.float64)

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        return self.ours(None, images, mask) + self.error * torch.eye(7, dtype=torch.float64)[2]  # type: ignore[arg-type]

    def usage(self, path: Path) -> str:
        return ""


@pytest.mark.parametrize("error", [3e-7, -3e-7, float("nan"), 0.0, 1e-9])
def test_small_differences_of_either_sign_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    recipe = recipe_in(tmp_path, input_size="12")
    form, path = Off(), tmp_path / "x.safetensors"
    monkeypatch.setitem(forms.FORMS, "off", form)
    form.error = error
    if abs(error) < 1e-8:
        assert exporting.export_weights(model_of(recipe), recipe, path, "off") == pytest.approx(error / 4, abs=1e-12)
        return
    with pytest.raises(RuntimeError, match="a library's outputs differ from ours by"):
        exporting.export_weights(model_of(recipe), recipe, path, "off")
    assert not list(tmp_path.iterdir())


def test_the_weights_that_were_asked_for_leave(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, input_size="12")
    teacher = away(recipe, seed=6)
    run, student = run_of(tmp_path / "run", recipe, teacher)
    for which, model in (("student", student), ("teacher", teacher)):
        path = tmp_path / f"{which}.safetensors"
        dispatch(["export", str(run), "--weights", which, "-o", str(path)])
        assert torch.equal(load_file(path)["cls_token"], model.cls_token)
        assert forms.metadata_of(path, "weights") == which


def test_even_the_eps_of_a_norm_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = run_with(tmp_path / "run")
    monkeypatch.setattr(huggingface, "LAYER_NORM_EPS", 1e-12)
    with pytest.raises(RuntimeError, match="transformers's outputs differ from ours"):
        exporting.export_weights(model, load_weights(tmp_path / "run")[1], tmp_path / "hf", "hf_vit")


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"input_size": "8x12"}, ["--format", "torchvision"], "needs square images, this model's are 8x12; use"),
        ({"channels": 1}, ["--format", "torchvision"], "needs 3 channels, this model has 1"),
        ({"input_size": "8x12"}, ["--format", "hf_vitmae"], "needs square images"),
        ({}, ["--format", "timn"], "argument --format: invalid choice: 'timn'"),
        ({}, ["-o", "x.pth"], "output x.pth must end in .safetensors for --format timm"),
        ({}, ["--format", "mae", "-o", "x.safetensors"], "must end in .pth for --format mae"),
        ({}, ["--format", "onnx", "-o", "x.pth"], "must end in .onnx for --format onnx"),
        ({}, ["--weights", "teacher"], "has no teacher weights|holds no training state"),
    ],
)
def test_exports_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run, _ = run_with(tmp_path / "run", **changes)
    with pytest.raises(UserError, match=message):
        dispatch(["export", str(run), *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_keeps_what_is_there(tmp_path: Path) -> None:
    _, model = run_with(tmp_path / "run")
    recipe = load_weights(tmp_path / "run")[1]
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="is there already; remove it"):
        exporting.export_weights(model, recipe, tmp_path / "taken", "hf_vit")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is there already"):
        exporting.export_weights(model, recipe, tmp_path / "file", "hf_vit")
    with torch.no_grad():
        model.cls_token[0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"weights \['cls_token'\] are not finite"):
        exporting.export_weights(model, recipe, tmp_path / "x.safetensors")


def test_a_library_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = run_with(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers, .*; install it: pip install 'fasthpm\[hf\]'"):
        exporting.export_weights(model, load_weights(tmp_path / "run")[1], tmp_path / "hf", "hf_vit")
    assert not (tmp_path / "hf").exists()


def test_statistics_travel_from_the_run(tmp_path: Path) -> None:
    """Whoever feeds the exported encoder must know how its images were normalised."""
    from transformers import AutoImageProcessor

    run, model = run_with(tmp_path / "run")
    recipe = load_weights(run)[1]
    exporting.export_weights(
        model, recipe, run / "encoder.safetensors", info={"mean": [0.1, 0.2, 0.3], "std": [1, 1, 2]}
    )
    dispatch(["export", str(run / "checkpoints/step-00000003"), "--format", "hf_vit", "-o", str(tmp_path / "hf")])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    picture = np.full((12, 12, 3), 255, dtype=np.uint8)
    values = processor(images=picture, return_tensors="pt")["pixel_values"][0, :, 0, 0]
    torch.testing.assert_close(values, torch.tensor([0.9, 0.8, 0.35]), rtol=0, atol=1e-5)


def test_timm_computes_what_the_encoder_computes(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, input_size="20x28")
    model = model_of(recipe).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path / "encoder.safetensors"
    exporting.export_weights(model, recipe, path, info={"mean": [0.5]})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["mean"]) == [0.5]
    vit = timm.models.VisionTransformer(**json.loads(metadata["timm"])).eval()
    vit.load_state_dict(load_file(path), strict=True)
    images = torch.randn(2, 1, 20, 28)
    with torch.no_grad():
        torch.testing.assert_close(vit.forward_features(images), model.encode(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vit(images), model.encode(images)[:, 0], rtol=1e-4, atol=1e-5)


def test_timm_create_model_loads_the_file(tmp_path: Path) -> None:
    """As README says it, at the published size."""
    recipe = Recipe(model="hpm_vit_tiny_patch16_224", decoder_dim=64, decoder_depth=1, decoder_heads=4)
    model = model_of(recipe).eval()
    path = tmp_path / "encoder.safetensors"
    exporting.export_weights(model, recipe, path)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(path)).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(vit.forward_features(images), model.encode(images), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------- videos
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
        with pytest.raises(
            UserError, match=f"{library} has no video ViT like this one; use one of hf_videomae, onnx, "
        ):
            dispatch(["export", str(run), "--format", form, "-o", str(tmp_path / "x.safetensors")])
    dispatch(["export", str(run), "-o", str(tmp_path / "all.safetensors")])
    dispatch(["import", str(tmp_path / "all.safetensors"), "-o", str(tmp_path / "back")])
    again, recipe = weights.load_weights(tmp_path / "back")
    assert recipe == weights.load_weights(run)[1]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("predict_loss", ["relative", "none"])
def test_a_difficulty_head_leaves_with_the_whole_model_alone(tmp_path: Path, predict_loss: str) -> None:
    """And comes back with it; Hugging Face's MAE and the encoders have no place for one."""
    run, model = run_with(tmp_path / "run", difficulty="in_place", predict_loss=predict_loss)
    images, whole = pictures(model), tmp_path / "model.safetensors"
    dispatch(["export", str(run), "--format", "safetensors", "-o", str(whole)])
    assert {name for name in load_file(whole) if "difficulty_head" in name}
    run_import(whole, tmp_path / "again")
    again, recipe = load_weights(tmp_path / "again")
    assert (recipe.difficulty, again.difficulty) == ("in_place", "in_place")
    assert torch.equal(again.predict_loss(images), model.predict_loss(images))
    for form, written in (("timm", "encoder.safetensors"), ("hf_vitmae", "hf")):
        dispatch(["export", str(run), "--format", form, "-o", str(tmp_path / written)])
        file = tmp_path / written if form == "timm" else tmp_path / written / "model.safetensors"
        assert not [name for name in load_file(file) if "difficulty" in name]
    run_import(whole, tmp_path / "encoder", "--encoder_only")
    note = json.loads(next((tmp_path / "encoder").glob("checkpoints/*/import.json")).read_text())
    assert "difficulty_head.fc.weight" in note["keys"]["student"]["ignored"]["not part of the encoder"]
    assert torch.equal(load_weights(tmp_path / "encoder")[0].encode(images), model.encode(images))


def test_a_broken_difficulty_head_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read back is asked what is hard, too."""
    run, _ = run_with(tmp_path / "run", difficulty="in_place")
    original = ours.save_tensors

    def damaging(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        tensors["difficulty_head.fc.weight"] += 0.1
        original(tensors, path, metadata)

    monkeypatch.setattr(ours, "save_tensors", damaging)
    with pytest.raises(RuntimeError, match="outputs differ from ours"):
        dispatch(["export", str(run), "--format", "safetensors", "-o", str(tmp_path / "model.safetensors")])


def test_a_difficulty_head_without_its_recipe_is_left_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, model = run_with(tmp_path / "run", difficulty="in_place")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "some.safetensors")
    run_import(tmp_path / "some.safetensors", tmp_path / "again", "--decoder_heads", "4")
    assert "a difficulty head, which the model lacks" in capsys.readouterr().out
    assert load_weights(tmp_path / "again")[1].difficulty == "paper"


@pytest.mark.parametrize("form", ["timm", "hf_vit"])
def test_nothing_of_the_run_is_overwritten(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything looked for below a file; from the run, from its checkpoint, and from within that."""
    run, _ = run_with(tmp_path / "run")
    folder = weights.checkpoint_of(run)
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(exporting, "load_weights", None)
    for source in (run, folder, Path(".")):
        for name in ("student.safetensors", "recipe.json", "state.json"):
            with pytest.raises(UserError, match=rf"output is {name}, and would overwrite what is read or was saved"):
                exporting.main([str(source), "--format", form, "-o", name])
        with pytest.raises(UserError, match=r"would lie in state.json, and that is a file"):
            exporting.main([str(source), "--format", form, "-o", "state.json/x.safetensors"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
