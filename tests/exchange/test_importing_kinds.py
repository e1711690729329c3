"""Files of other people's trainers and programs: what is beside the weights, around them, and no weights at all."""

import argparse
import collections
import datetime
import decimal
import gzip
import io
import os
import tarfile
import types
import zipfile
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fasthpm import checkpoint, files
from fasthpm.checkpoint import foreign
from fasthpm.data.statistics import PixelStatistics
from fasthpm.errors import UserError
from fasthpm.exchange import importing
from fasthpm.exchange.importing import import_weights
from fasthpm.probes.clips import at_rate
from tests.helpers.published import published

HEADS = {"decoder_heads": 2}


# -------------------------------------------------------------------------------------------------- beside the weights
BESIDE = {
    "int32": np.int32(3), "uint8": np.uint8(3), "float16": np.float16(0.5), "bool": np.bool_(True),
    "text": np.str_("a"), "array": np.arange(3), "type": np.float32, "dtype": np.dtype("int32"),
    "range": range(3), "slice": slice(1, 2), "int": int, "str": str, "list": list, "NoneType": type(None),
    "frozenset": frozenset({1}), "complex": 1j, "defaultdict": collections.defaultdict(list, a=[1]),
    "SimpleNamespace": types.SimpleNamespace(a=1), "datetime": datetime.datetime(2020, 1, 1),
    "Decimal": decimal.Decimal("0.1"), "path": PureWindowsPath("c:/a"), "Namespace": argparse.Namespace(a=range(2)),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_harmless_things_beside_the_weights_are_read(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"x": torch.ones(2)}, "args": BESIDE[name]}, path, _use_new_zipfile_serialization=zipped)
    found = files.read_file(path)[0]
    assert np.array_equal(found["args"], BESIDE[name]) if name == "array" else found["args"] == BESIDE[name]


@pytest.mark.parametrize("name", ["eval", "getattr", "open", "exec", "__import__", "print"])
def test_other_builtins_are_not(tmp_path: Path, name: str) -> None:
    torch.save({"args": __builtins__[name]}, tmp_path / "a.pth")  # type: ignore[index]
    with pytest.raises(UserError, match=r"needs Python code to load \((builtins\.|__builtin__\.|io\.|_io\.)?\w+\)"):
        files.read_file(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("stored", "video", "want"),
    [
        ({"sampling_rate": 4, "mask_ratio": 0.9}, True, {"sampling_rate": 4, "mask_ratio": 0.9}),
        ({"sampling_rate": 4}, False, {}),
        ({"sampling_rate": 0, "mask_ratio": 1.5}, True, {}),
        ({"sampling_rate": True, "mask_ratio": "0.5"}, True, {}),
        ({"norm_pix_loss": True}, False, {"norm_pix_loss": True}),
        ({"mask_ratio": np.float64(0.6)}, False, {"mask_ratio": 0.6}),
    ],
)
def test_what_arguments_tell(stored: dict[str, Any], video: bool, want: dict[str, Any]) -> None:
    assert importing.told_by(stored, video) == want


@pytest.mark.parametrize("kind", [argparse.Namespace, dict, types.SimpleNamespace])
def test_arguments_of_any_kind_are_heard_and_flags_more(tmp_path: Path, kind: Any) -> None:
    torch.save({"model": published(), "args": kind(mask_ratio=0.5)}, tmp_path / "a.pth")
    imported = import_weights(tmp_path / "a.pth", given=HEADS)
    assert imported.recipe.mask_ratio == 0.5
    assert "mask_ratio 0.5" in imported.told
    assert import_weights(tmp_path / "a.pth", given={**HEADS, "mask_ratio": 0.6}).recipe.mask_ratio == 0.6


@pytest.mark.parametrize(
    ("metadata", "channels", "pixels", "want"),
    [
        ({}, 3, None, PixelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ({}, 1, None, None),
        ({"mean": "[0.5]", "std": "[0.2]"}, 1, None, PixelStatistics((0.5,), (0.2,))),
        ({"mean": "[0.5]", "std": "[0.2]"}, 3, None, PixelStatistics((0.5,) * 3, (0.2,) * 3)),
        ({}, 1, PixelStatistics((0.3,), (0.1,)), PixelStatistics((0.3,), (0.1,))),
    ],
)
def test_an_import_says_by_what_its_pixels_are_normalised(
    tmp_path: Path, metadata: dict[str, str], channels: int, pixels: Any, want: Any
) -> None:
    save_file(published(channels=channels), tmp_path / "a.safetensors", metadata)
    imported = import_weights(tmp_path / "a.safetensors", given=HEADS, pixels=pixels)
    assert imported.pixels == want
    importing.write_run(tmp_path / "run", imported, {})
    assert checkpoint.load_weights(tmp_path / "run")[0].pixels == want


@pytest.mark.parametrize(
    "flags", [["--mean", "0.5"], ["--std", "0.5"], ["--mean", "0.5", "0.5", "--std", "1", "1"],
              ["--mean", "128", "--std", "60"], ["--mean", "0.5", "--std", "0"]],
)  # fmt: skip
def test_half_of_the_statistics_is_refused(tmp_path: Path, flags: list[str]) -> None:
    save_file(published(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"expected both, of one or three numbers"):
        importing.main([str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "run"), *flags])


def test_a_rate_is_for_clips() -> None:
    recipe = import_weights.__globals__["recipes"].from_name("debug")
    assert at_rate(recipe, 0) is recipe
    with pytest.raises(UserError, match="sampling_rate is 2, but the model takes images"):
        at_rate(recipe, 2)
    with pytest.raises(UserError, match="sampling_rate is -1, expected 0 or more"):
        at_rate(recipe, -1)


# -------------------------------------------------------------------------------------------------- around the weights
def test_names_beside_a_wrapper(tmp_path: Path) -> None:
    """As torch.optim.swa_utils.AveragedModel writes it, and others that count."""
    state = {f"module.{key}": value for key, value in published().items()}
    torch.save({"state_dict": {"n_averaged": torch.tensor(3), **state}}, tmp_path / "swa.pth")
    imported = import_weights(tmp_path / "swa.pth", given=HEADS)
    assert imported.reports["student"].ignored == {"how many weights were averaged": ["n_averaged"]}
    torch.save({"state_dict": {"steps_done": torch.ones(1), **state}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"weights lie under 'module\.', but for steps_done: leave .* with --ignore"):
        import_weights(tmp_path / "other.pth", given=HEADS)
    imported = import_weights(tmp_path / "other.pth", given=HEADS, ignore=["steps_done"])
    assert imported.reports["student"].ignored == {"as asked": ["steps_done"]}
    torch.save({f"trunk.{key}": value for key, value in published().items()}, tmp_path / "trunk.pth")
    with pytest.raises(UserError, match=r"weights lie under 'trunk\.', which no known trainer puts there"):
        import_weights(tmp_path / "trunk.pth", given=HEADS)


@pytest.mark.parametrize(
    ("key", "whose"),
    [
        ("vit.embeddings.patch_embeddings.projection.weight", "Hugging Face transformers"),
        ("videomae.embeddings.patch_embeddings.projection.weight", "Hugging Face transformers"),
        ("conv_proj.weight", "torchvision"),
        ("visual.conv1.weight", "OpenAI's CLIP or open_clip"),
        ("layer1.0.conv1.weight", "a residual network"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_layouts_of_others_are_named(tmp_path: Path, key: str, whose: str, nested: bool) -> None:
    torch.save({"model": {key: torch.ones(2)}} if nested else {key: torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"has the names of {whose}"):
        import_weights(tmp_path / "a.pth")


def test_layer_scale_is_named(tmp_path: Path) -> None:
    save_file({**published(), "blocks.0.ls1.gamma": torch.ones(128)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"unexpected .* it has the names of a ViT with LayerScale"):
        import_weights(tmp_path / "a.safetensors", given=HEADS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: (x * 10).to(torch.int8),
            r"quantised, no plain weights \['norm.weight \(int8\)'\]; give the weights as",
        ),
        (lambda x: x.to(torch.float8_e4m3fn), r"quantised, no plain weights \['norm.weight \(float8_e4m3fn\)'\]"),
        (lambda x: x > 0, r"quantised, no plain weights \['norm.weight \(bool\)'\]"),
        (lambda x: x * torch.nan, r"not finite \['norm.weight'\]"),
        (lambda x: x + torch.inf, r"not finite \['norm.weight'\]"),
    ],
)
def test_weights_that_are_none_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    state: dict[str, Tensor] = published()
    save_file({**state, "norm.weight": change(state["norm.weight"])}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        import_weights(tmp_path / "a.safetensors", given=HEADS)


def test_a_checkpoint_of_ours_is_not_better(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "a.pth")
    imported = import_weights(tmp_path / "a.pth", given=HEADS)
    imported.states["student"]["norm.bias"][3] = torch.nan
    importing.write_run(tmp_path / "run", imported, {})
    with pytest.raises(UserError, match=r"no valid checkpoint: .* weights are not finite: norm\.bias"):
        checkpoint.load_weights(tmp_path / "run")


# -------------------------------------------------------------------------------------------------- no weights at all
def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as files_in_it:
            files_in_it.writestr("readme.txt", "hello")
    else:
        with tarfile.open(fileobj=out, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("readme.txt"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; copy or download it again"),
        (b"<!DOCTYPE html>\n<html><head>", r"is a web page \(HTML\)"),
        (b"\n  <html lang='en'>", r"is a web page \(HTML\)"),
        (b"<?xml version='1.0'?><Error>", r"is a web page \(HTML\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git LFS pointer"),
        (archive("zip"), r"is a zip archive of readme\.txt; unpack it"),
        (archive("tar"), r"is a tar archive of readme\.txt; unpack it"),
        (gzip.compress(b"x" * 99, mtime=0), "is a compressed archive; unpack it first"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"),
        (b"\x93NUMPY\x01\x00" + bytes(99), r"is a NumPy array"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_what_is_something_else_is_named(tmp_path: Path, content: bytes, message: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        files.read_file(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_program_is_named(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    with pytest.raises(UserError, match="is a TorchScript program"):
        files.read_file(tmp_path / "a.pt")


# -------------------------------------------------------------------------------------------------- what is written
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_tensors_are_readable_to_whom_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.save_tensors({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_names_at_any_depth() -> None:
    content = {"a": {"b": {"c": torch.ones(1)}}, "d": torch.ones(1), "e": 3}
    assert sorted(foreign.all_names(content)) == ["c", "d"]
