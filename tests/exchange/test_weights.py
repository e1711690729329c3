"""Weights that come from other code and leave for other libraries: the same outputs on both sides, or a refusal."""

import argparse
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.models
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasthpm import files, recipes
from fasthpm.__main__ import dispatch
from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.checkpoint import weights
from fasthpm.checkpoint.foreign import find_weights, load_reference, strip_wrappers
from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from fasthpm.exchange import exporting, forms
from fasthpm.exchange.importing import import_weights, write_run
from fasthpm.files import read_file
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.recipes import listing
from tests.helpers import reference
from tests.helpers.launch import check_ranks

WIDTH, DEPTH, HEADS = 128, 4, 4  # the registered size "nano"
PATCH, CHANNELS, GRID = 4, 3, (3, 3)
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 32, 2, 4
FLAGS = ["--decoder_heads", str(DECODER_HEADS)]


# -------------------------------------------------------------------------------------------------- published keys
def published(
    *, predictor: bool = True, grid: tuple[int, int] = GRID, seed: int = 0, **sizes: int
) -> dict[str, Tensor]:
    """Random weights under the documented keys of HPM's checkpoints, or of MAE's (without `predictor`)."""
    generator = torch.Generator().manual_seed(seed)
    width, depth = sizes.get("width", WIDTH), sizes.get("depth", DEPTH)
    channels, values = sizes.get("channels", CHANNELS), sizes.get("channels", CHANNELS) * PATCH**2
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, channels, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_embed.weight": (DECODER_WIDTH, width),
        "decoder_embed.bias": (DECODER_WIDTH,),
        "mask_token": (1, 1, DECODER_WIDTH),
    }
    stacks = {"blocks": (depth, width)}
    for tail in ("", "_losspred") if predictor else ("",):
        stacks[f"decoder_blocks{tail}"] = (DECODER_DEPTH, DECODER_WIDTH)
        shapes[f"decoder_norm{tail}.weight"] = shapes[f"decoder_norm{tail}.bias"] = (DECODER_WIDTH,)
        shapes |= {f"decoder_pred{tail}.weight": (values, DECODER_WIDTH), f"decoder_pred{tail}.bias": (values,)}
    for name, (count, dim) in stacks.items():
        for i in range(count):
            shapes |= {f"{name}.{i}.{key}": shape for key, shape in block_shapes(dim).items()}
    state = {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    state["pos_embed"] = reference.sincos(width, *grid).float()[None]
    state["decoder_pos_embed"] = reference.sincos(DECODER_WIDTH, *grid).float()[None]
    return {key: value + 1 if "norm" in key and key.endswith("weight") else value for key, value in state.items()}


def block_shapes(dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"norm{n}.{kind}": (dim,) for n in (1, 2) for kind in ("weight", "bias")}
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for name, (rows, columns) in layers.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


class Published:
    """The published models' forward, from their state dict, written out for one image."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {key: value.double() for key, value in state.items()}

    def layer(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def blocks(self, name: str, x: Tensor, heads: int) -> Tensor:
        for i in range(sum(key.startswith(f"{name}.") and key.endswith("norm1.bias") for key in self.state)):
            block = f"{name}.{i}"
            query, key, value = self.layer(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x)).chunk(3, dim=-1)
            parts = []
            for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
                parts.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
            x = x + self.layer(f"{block}.attn.proj", torch.cat(parts, -1))
            x = x + self.layer(
                f"{block}.mlp.fc2", F.gelu(self.layer(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x)))
            )
        return x

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        kernel, bias = self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"]
        tokens = F.conv2d(image[None], kernel, bias, stride=kernel.shape[-1])[0].flatten(1).T
        tokens = (tokens + self.state["pos_embed"][0, 1:])[~mask]
        tokens = torch.cat([self.state["cls_token"][0] + self.state["pos_embed"][0, :1], tokens])
        return self.norm("norm", self.blocks("blocks", tokens, HEADS))

    def decode(self, latent: Tensor, mask: Tensor, tail: str = "") -> Tensor:
        """The masked patches' predictions [M, P*P*C]; `tail` "_losspred" is the loss predictor."""
        tokens, positions = self.layer("decoder_embed", latent), self.state["decoder_pos_embed"][0]
        masked = self.state["mask_token"][0] + positions[1:][mask]
        tokens = torch.cat([tokens[:1] + positions[:1], tokens[1:] + positions[1:][~mask], masked])
        tokens = self.norm(f"decoder_norm{tail}", self.blocks(f"decoder_blocks{tail}", tokens, DECODER_HEADS))
        return self.layer(f"decoder_pred{tail}", tokens[-int(mask.sum()) :])


def check_same(model: HPMViT, state: dict[str, Tensor], decoders: bool = True) -> None:
    """Our outputs against the published forward's, in float64."""
    plain, model = Published(state), model.double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, model.in_chans, *model.img_size, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, model.num_patches, generator=generator).argsort(1) < model.num_patches * 3 // 4
    with torch.no_grad():
        out, latents = model(images, masks), model.encode(images, masks)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        latent = plain.encode(image, mask)
        torch.testing.assert_close(latents[i], latent)
        if decoders:
            torch.testing.assert_close(out.reconstruction[i], plain.decode(latent, mask))
        if decoders and any("losspred" in key for key in state):
            difficulty = plain.decode(latent, mask, "_losspred").mean(-1)  # the published head's many rows, averaged
            torch.testing.assert_close(out.predicted_difficulty[i], difficulty)


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


def run_import(path: Path, output: Path, *flags: str) -> None:
    dispatch(["import", str(path), "-o", str(output), *flags])


# -------------------------------------------------------------------------------------------------- import
def test_hpm_checkpoint_with_its_ema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As HPM's trainer writes it; the run computes what the file's student and teacher compute."""
    student, teacher = published(seed=1), published(seed=2)
    extra = {"epoch": 200, "optimizer": {"state": {}, "param_groups": []}, "model": "mae_vit_base_patch16"}
    torch.save({**extra, "state_dict": prefixed(student), "ema_state_dict": teacher}, tmp_path / "hpm.pth")
    run_import(tmp_path / "hpm.pth", tmp_path / "run", *FLAGS)
    for which, state in (("student", student), ("teacher", teacher)):
        model, recipe = load_weights(tmp_path / "run", which)
        check_same(model, state)
    assert (recipe.model, recipe.image_size, recipe.channels, recipe.norm_pix_loss) == (
        "hpm_vit_nano_patch4_28",
        (12, 12),
        3,
        False,
    )
    text = capsys.readouterr().out
    assert "hpm checkpoint: nano, patches of 4, images 12x12x3, decoder 32 x 2" in text
    assert f"converted  2, the average of {PATCH**2 * 3} rows, the same function: decoder_pred_losspred.weight" in text
    assert "assumed    4 heads, norm_pix_loss False: not told by the shapes" in text


def test_a_predictor_of_a_depth_of_its_own(tmp_path: Path) -> None:
    state = {k: v for k, v in published().items() if not k.startswith(f"decoder_blocks_losspred.{DECODER_DEPTH - 1}.")}
    torch.save(state, tmp_path / "hpm.pth")
    run_import(tmp_path / "hpm.pth", tmp_path / "run", *FLAGS)
    model, recipe = load_weights(tmp_path / "run")
    assert (recipe.decoder_depth, recipe.predictor_depth) == (DECODER_DEPTH, DECODER_DEPTH - 1)
    check_same(model, state)


def test_mae_checkpoint_with_its_arguments(tmp_path: Path) -> None:
    """As MAE's trainer writes it: an argparse namespace and NumPy numbers lie beside the weights."""
    state = published(predictor=False, grid=(2, 4))
    arguments = argparse.Namespace(norm_pix_loss=False, output_dir=Path("/out"), best=np.float64(1.5))
    torch.save({"model": state, "epoch": 3, "scaler": {}, "args": arguments}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="its 8 patches make no square; give --input_size"):
        run_import(tmp_path / "mae.pth", tmp_path / "run", *FLAGS)
    run_import(tmp_path / "mae.pth", tmp_path / "run", *FLAGS, "--input_size", "8x16")
    model, recipe = load_weights(tmp_path / "run")
    check_same(model, state)
    assert (recipe.predict_loss, recipe.mask_policy, recipe.norm_pix_loss) == ("none", "random", False)
    note = json.loads((tmp_path / "run/checkpoints/step-00000000/import.json").read_text())
    assert (note["source"], note["file"], note["sha256"]) == ("mae", "mae.pth", files.file_hash(tmp_path / "mae.pth"))
    assert set(note["keys"]["student"]["matched"]) == set(state)


def test_bare_state_dicts_and_safetensors(tmp_path: Path) -> None:
    """Without nesting; AMT's are MAE's; one of half precision is widened."""
    state = {key: value.half() for key, value in published(predictor=False).items()}
    save_file(state, tmp_path / "amt.safetensors")
    torch.save(state, tmp_path / "amt.pth", _use_new_zipfile_serialization=False)
    for name in ("amt.safetensors", "amt.pth"):
        imported = import_weights(tmp_path / name, source="amt", given={"decoder_heads": DECODER_HEADS})
        assert not imported.reports["student"].matched
        assert set(imported.reports["student"].converted["float16 to float32"]) == set(state)
        model = model_of(imported.recipe)
        model.load_state_dict(imported.states["student"])
        check_same(model, state)


@pytest.mark.parametrize("name", ["model_ema", "ema_state_dict", "teacher"])
def test_either_of_student_and_teacher_alone(tmp_path: Path, name: str) -> None:
    student, teacher = published(seed=1), published(seed=2)
    torch.save({"model": student, name: {"module": prefixed(teacher)}}, tmp_path / "both.pth")
    for which, state in (("student", student), ("teacher", teacher)):
        imported = import_weights(tmp_path / "both.pth", weights=which, given={"decoder_heads": DECODER_HEADS})
        assert list(imported.states) == ["student"]
        assert torch.equal(imported.states["student"]["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    torch.save({"model": student}, tmp_path / "one.pth")
    with pytest.raises(UserError, match="holds no teacher weights, only student; leave --weights out"):
        import_weights(tmp_path / "one.pth", weights="teacher")


def test_wrappers_are_stripped_only_where_all_keys_have_them() -> None:
    state = {"patch_embed.proj.weight": torch.ones(1), "model.x": torch.ones(1)}
    assert strip_wrappers({f"module._orig_mod.{key}": value for key, value in state.items()}) == state
    assert find_weights({"module": {"model": state}, "optimizer": {}}, "student") == state
    assert find_weights(state, "teacher") == {}


def test_a_recipe_that_fits_and_one_that_does_not(tmp_path: Path) -> None:
    """An MAE checkpoint continues as HPM; its loss predictor is fresh, and said to be."""
    save_file(published(predictor=False, grid=(7, 7), channels=1), tmp_path / "mae.safetensors")
    with pytest.raises(UserError, match=r"another model: decoder_depth 1 \(file: 2\)"):
        run_import(tmp_path / "mae.safetensors", tmp_path / "run", "--recipe", "debug")
    with pytest.raises(
        UserError, match=r"patch_size 16 \(file: 4\), channels 3 \(file: 1\), patches of input_size 224"
    ):
        run_import(tmp_path / "mae.safetensors", tmp_path / "run", "--recipe", "hpm_vit_base_in1k_200e")
    base = Recipe(**{**vars(recipes.debug()), "decoder_depth": 2})
    imported = import_weights(tmp_path / "mae.safetensors", base=base)
    assert imported.recipe == base
    assert all("losspred" in key for key in imported.reports["student"].fresh)
    fresh = model_of(base).state_dict()["decoder_pred_losspred.weight"]
    assert torch.equal(imported.states["student"]["decoder_pred_losspred.weight"], fresh)


def broken(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    state = published()
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (broken(lambda s: s.pop("norm.bias")), r"missing \['norm.bias'\]"),
        (broken(lambda s: s.pop("decoder_blocks_losspred.1.mlp.fc1.weight")), r"missing \['decoder_blocks_losspred"),
        (broken(lambda s: s.pop("decoder_norm.weight")), r"missing \['decoder_norm.weight'\]"),
        (broken(lambda s: s.pop("decoder_pos_embed")), r"missing \['decoder_pos_embed'\]"),
        (broken(lambda s: s.update({"blocks.0.gamma_1": torch.ones(1)})), r"unexpected \['blocks.0.gamma_1'\]"),
        (broken(lambda s: s.update({"mask_token": torch.ones(1, 1, 7)})), r"wrong shape \['mask_token \(1, 1, 7\) for"),
        (broken(lambda s: s["norm.bias"].fill_(np.nan)), r"not finite \['norm.bias'\]; the file is of no use"),
        (broken(lambda s: s.pop("pos_embed")), "have no pos_embed, which every HPM"),
        (broken(lambda s: s.update({"pos_embed": torch.zeros(0)})), "the weights are empty: ZeRO-3"),
        (published(depth=5), "its encoder is 128 wide with 5 blocks; expected one of 128 x 4"),
        (broken(lambda s: s.update({"decoder_pred.weight": torch.ones(512, 32)})), "predicts 512 values per patch"),
        ({f"encoder.{k}": v for k, v in published().items()}, "source videomae: these are an image model's"),
        ({"layers.0.weight": torch.ones(2)}, r"holds no weights of a vision transformer \(its keys: layers.0.weight\)"),
        (published(predictor=False), None),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path: Path, state: dict[str, Tensor], message: str | None) -> None:
    path = tmp_path / "some.safetensors"
    save_file(state, path)
    if message is None:  # the untouched weights pass
        run_import(path, tmp_path / "run", *FLAGS)
        return
    with pytest.raises(UserError, match=message) as caught:
        run_import(path, tmp_path / "run", *FLAGS)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_heads_that_nobody_told_are_asked_for(tmp_path: Path) -> None:
    save_file(published(), tmp_path / "hpm.safetensors")
    with pytest.raises(UserError, match=r"decoders are 32 wide, and shapes do not tell .* give --decoder_heads"):
        run_import(tmp_path / "hpm.safetensors", tmp_path / "run")


def test_keys_are_left_aside_only_for_a_reason(tmp_path: Path) -> None:
    state = {**published(), "vis_mask_token": torch.ones(1), "queue.0": torch.ones(1), "queue.1": torch.ones(1)}
    save_file(state, tmp_path / "hpm.safetensors")
    with pytest.raises(UserError, match=r"unexpected \['queue.0', 'queue.1'\]"):
        import_weights(tmp_path / "hpm.safetensors", given={"decoder_heads": 4})
    imported = import_weights(tmp_path / "hpm.safetensors", given={"decoder_heads": 4}, ignore=["queue."])
    assert imported.reports["student"].ignored["as asked"] == ["queue.0", "queue.1"]
    assert ["vis_mask_token"] in imported.reports["student"].ignored.values()


@pytest.mark.parametrize("pooled", [False, True])
def test_a_classifiers_encoder(tmp_path: Path, pooled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Only when asked for, and what needs its decoder is refused afterwards."""
    state = {k: v for k, v in published().items() if not k.startswith(("decoder_", "mask_token"))}
    state |= {"head.weight": torch.ones(10, WIDTH), "head.bias": torch.ones(10)}
    if pooled:
        state = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in state.items()}
    torch.save({"model": state}, tmp_path / "tuned.pth")
    with pytest.raises(
        UserError, match=r"is a classifier, without the decoder .* take its encoder with --encoder_only"
    ):
        run_import(tmp_path / "tuned.pth", tmp_path / "run")
    run_import(tmp_path / "tuned.pth", tmp_path / "run", "--encoder_only")
    text = capsys.readouterr().out
    assert "2, a classifier's head: head.weight, head.bias" in text
    assert "freshly initialised: mask_token, " in text
    assert ("from fc_norm, which normalised the averaged patches" in text) == pooled
    model, _ = load_weights(tmp_path / "run")
    plain = {k.replace("fc_norm.", "norm."): v for k, v in state.items()}
    check_same(model, plain, decoders=False)
    dispatch(["export", str(tmp_path / "run"), "-o", str(tmp_path / "encoder.safetensors")])
    for form in ("safetensors", "hf_vitmae"):
        with pytest.raises(UserError, match="was imported without a decoder"):
            dispatch(["export", str(tmp_path / "run"), "--format", form, "-o", str(tmp_path / "x.safetensors")])


def test_the_encoder_of_a_whole_checkpoint(tmp_path: Path) -> None:
    """HPM trained on features has a decoder that no model here has; its encoder is welcome."""
    state = {**published(), "decoder_pred.weight": torch.ones(512, DECODER_WIDTH), "decoder_pred.bias": torch.ones(512)}
    save_file(state, tmp_path / "features.safetensors")
    run_import(tmp_path / "features.safetensors", tmp_path / "run", "--encoder_only")
    model, _ = load_weights(tmp_path / "run")
    check_same(model, state, decoders=False)
    del state["norm.bias"]
    save_file(state, tmp_path / "features.safetensors")
    with pytest.raises(UserError, match=r"missing \['norm.bias'\]"):
        import_weights(tmp_path / "features.safetensors", encoder_only=True)


def test_a_decoder_of_features_needs_a_recipe_that_says_whose(tmp_path: Path) -> None:
    state = published(grid=(7, 7), channels=1)
    state |= {"decoder_pred.weight": torch.ones(512, DECODER_WIDTH), "decoder_pred.bias": torch.ones(512)}
    save_file(state, tmp_path / "features.safetensors")
    with pytest.raises(UserError, match=r"predicts 512 values per patch, not the 16 pixels: .* name a --recipe"):
        import_weights(tmp_path / "features.safetensors", given={"decoder_heads": DECODER_HEADS})
    base = Recipe(**{**vars(recipes.debug()), "decoder_depth": 2, "target": "clip"})
    imported = import_weights(tmp_path / "features.safetensors", base=base)
    assert torch.equal(imported.states["student"]["decoder_pred.weight"], state["decoder_pred.weight"])
    with pytest.raises(UserError, match="not the 768 features of the recipe's target"):
        import_weights(tmp_path / "features.safetensors", base=Recipe(**{**vars(base), "target": "dino"}))


def test_load_reference_is_all_or_nothing() -> None:
    model = model_of(recipes.debug())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = {key: value + 1 for key, value in before.items()}
    with pytest.raises(UserError, match="missing"):
        load_reference(model, {key: value for key, value in given.items() if key != "norm.bias"}, "hpm")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    load_reference(model, prefixed(given), "hpm")
    assert all(torch.equal(value, given[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match=r"source is 'mea', expected one of .*; did you mean 'mae'"):
        load_reference(model, given, "mea")


# -------------------------------------------------------------------------------------------------- files
class Code:
    """Unpickling it would write a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_never_runs(tmp_path: Path, form: str) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"model": published(), "extra": Code(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    expected = "plain pickles are never loaded" if form == "pickle" else r"needs Python code to load \(\w+\.system\)"
    with pytest.raises(UserError, match=expected) as caught:
        run_import(path, tmp_path / "run", *FLAGS)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    pickle.loads(pickle.dumps(content["extra"]))
    assert trace.exists()  # the trap itself works


def corrupt(path: Path, kind: str) -> None:
    """Make `path` a file, or a folder, that is no checkpoint."""
    if kind.startswith("half"):
        torch.save({"model": published()}, path, _use_new_zipfile_serialization=kind == "half a zip")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "list":
        torch.save([torch.ones(2)], path)
    elif kind == "folder":
        path.mkdir()
        (path / "weights.pth").touch()
    elif kind != "nothing":
        path.write_bytes({"text": b"hello world\n" * 20, "empty": b"", "picture": b"\xff\xd8\xff" + bytes(99)}[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("half a zip", "is damaged, or not a file of torch.save"),
        ("half a legacy file", "is damaged, or not a file of torch.save"),
        ("text", "is damaged, or not a file of torch.save"),
        ("empty", "is damaged, or not a file of torch.save"),
        ("picture", "is damaged, or not a file of torch.save"),
        ("module", r"needs Python code to load \(torch.nn.modules.linear.Linear\)"),
        ("list", "holds a list, expected a dictionary"),
        ("folder", r"is a folder \(with weights.pth\); give a checkpoint file"),
        ("nothing", r"cannot be read \(No such file or directory\)"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, kind: str, message: str) -> None:
    corrupt(tmp_path / "some.pth", kind)
    with pytest.raises(UserError, match=message) as caught:
        run_import(tmp_path / "some.pth", tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tensor_larger_than_its_file(tmp_path: Path) -> None:
    torch.save({**published(), "pos_embed": torch.zeros(1).expand(1, 10**9, WIDTH)}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"pos_embed claims shape \(1, 1000000000, 128\), and the file holds less"):
        run_import(tmp_path / "bomb.pth", tmp_path / "run")


def test_half_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file(published(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        read_file(path)


def test_deepspeeds_files(tmp_path: Path) -> None:
    """The model states are weights; the optimizer states are not, whether or not they can be read."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    torch.save(
        {"module": prefixed({f"student.{k}": v for k, v in published().items()}), "ds_config": {}},
        tmp_path / "mp_rank_00_model_states.pt",
    )
    run_import(tmp_path / "mp_rank_00_model_states.pt", tmp_path / "run", *FLAGS)
    for scaler in ({}, LossScaler(1.0)):
        torch.save({"optimizer_state_dict": {"loss_scaler": scaler}, "ds_config": {}}, tmp_path / "optim_states.pt")
        with pytest.raises(UserError, match="DeepSpeed's optimizer state, not weights; give mp_rank_00_model_states"):
            run_import(tmp_path / "optim_states.pt", tmp_path / "other")


def test_a_run_of_ours_needs_no_import(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is a folder of FastHPM itself, which knn, visualize, export"):
        read_file(tmp_path)


def test_an_import_never_overwrites(tmp_path: Path) -> None:
    save_file(published(), tmp_path / "hpm.safetensors")
    imported = import_weights(tmp_path / "hpm.safetensors", given={"decoder_heads": 4})
    write_run(tmp_path / "run", imported, {})
    with pytest.raises(UserError, match="holds checkpoints already; choose another --output"):
        write_run(tmp_path / "run", imported, {})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_run(tmp_path / "file", imported, {})


# -------------------------------------------------------------------------------------------------- further pretraining
def imported_debug(folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda _: None) -> Path:
    """A file with the debug recipe's model, its weights moved, made a run."""
    state = {key: value.clone() for key, value in model_of(recipes.debug()).state_dict().items()}
    state["cls_token"] += 1
    state["decoder_pred_losspred.bias"] += 1
    change(state)
    save_file(state, folder / "some.safetensors")
    run_import(folder / "some.safetensors", folder / "imported", "--decoder_heads", "4")
    return folder / "imported"


def test_pretraining_starts_from_an_import(tmp_path: Path) -> None:
    """One update at a vanishing learning rate leaves the imported weights, which are far from the recipe's."""
    start = imported_debug(tmp_path)
    given = ["--recipe", "debug", "--init_from", start, "--stop_after", 1, "--lr", 1e-12, "--panel_every", 0]
    check_ranks("fasthpm", "pretrain", *given, "--output_dir", tmp_path / "run", launcher="forked", ranks=1)
    before, after = (load_weights(folder)[0].state_dict() for folder in (start, tmp_path / "run"))
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-2, atol=1e-3)
    untrained, _ = load_weights(tmp_path / "run", "untrained")
    assert torch.equal(untrained.cls_token, before["cls_token"])


def test_an_import_is_looked_at_like_a_run(tmp_path: Path) -> None:
    given = ["--data_path", "synthetic:4", "--num_images", "2", "-o", str(tmp_path / "panel.png")]
    dispatch(["visualize", str(imported_debug(tmp_path)), *given])
    assert (tmp_path / "panel.png").read_bytes()[:4] == b"\x89PNG"


def test_initial_weights(tmp_path: Path) -> None:
    start = imported_debug(tmp_path)
    recipe = Recipe(**{**vars(recipes.debug()), "init_from": str(start)})
    assert torch.equal(weights.initial_model(recipe).cls_token, load_weights(start)[0].cls_token)
    fresh = model_of(recipe).cls_token
    assert torch.equal(weights.initial_model(recipes.debug()).cls_token, fresh)
    with pytest.raises(
        UserError, match=r"imported: hpm weights do not fit the model: missing \['blocks.4.norm1.weight'"
    ):
        weights.initial_model(Recipe(**{**vars(recipe), "model": "hpm_vit_tiny_patch4_28"}))
    with pytest.raises(UserError, match="holds no valid checkpoint"):
        weights.initial_model(Recipe(**{**vars(recipe), "init_from": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match=r"holds imported weights and no optimizer state to resume; .* --init_from"):
        checkpoint_folder.find_resume(Recipe(**{**vars(recipe), "output_dir": str(start)}), pytest.fail)


def test_learned_positions_are_no_start(tmp_path: Path) -> None:
    start = imported_debug(tmp_path, lambda state: state["pos_embed"].add_(0.1))
    with pytest.raises(UserError, match="has a learned pos_embed, and pretraining keeps the fixed"):
        weights.initial_model(Recipe(**{**vars(recipes.debug()), "init_from": str(start)}))


# -------------------------------------------------------------------------------------------------- export
def run_with(folder: Path, **changes: Any) -> tuple[Path, HPMViT]:
    """A run whose weights, biases and norms are all away from their initial values, and its model."""
    sizes = {"input_size": "12", "channels": 3, "decoder_depth": 2, "norm_pix_loss": True}
    recipe = Recipe(**{**vars(recipes.debug()), **sizes, **changes})
    model = model_of(recipe).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    aside = checkpoint_folder.begin(folder, 3)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, aside / "student.safetensors")
    checkpoint_folder.commit(aside, recipe, checkpoint_folder.RunState(3, {}, 1, 1))
    return folder, model


def pictures(model: HPMViT) -> Tensor:
    return torch.randn(2, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(9))


def close(theirs: Tensor, ours: Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


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
    line = forms.FORMS["timm"].usage(tmp_path / "tiny.safetensors")
    vit = eval(line, {"timm": timm}).eval()
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


@pytest.mark.parametrize("form", forms.FORMS)
def test_a_difference_leaves_no_file(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight that is off by a ten-thousandth on its way out is found in every form."""
    video = {"model": "hpm_vit_nano_patch8_32_video", "num_frames": 4, "tubelet_size": 2}
    _, model = run_with(tmp_path / "run", **(video if form == "hf_videomae" else {}))
    recipe = load_weights(tmp_path / "run")[1]
    original = forms.save_tensors

    def off(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        names = ("blocks.2.norm2.bias", "layer_2.ln_2.bias", "layer.2.layernorm_after.bias")
        key = next(key for key in tensors if key.endswith(names))
        tensors[key][3] += 1e-4
        original(tensors, path, metadata)

    monkeypatch.setattr(forms, "save_tensors", off)
    output = tmp_path / "out" / "some.safetensors"
    with pytest.raises(RuntimeError, match="outputs differ from ours by"):
        exporting.export_weights(model, recipe, output, form)
    assert not list(output.parent.iterdir())
    monkeypatch.setattr(forms, "save_tensors", original)
    assert exporting.export_weights(model, recipe, output, form) < 1e-12


def test_even_the_eps_of_a_norm_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = run_with(tmp_path / "run")
    monkeypatch.setattr(forms, "LAYER_NORM_EPS", 1e-12)
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


# -------------------------------------------------------------------------------------------------- recipes
def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    dispatch(["recipes", *arguments])
    return capsys.readouterr().out.splitlines()


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys)
    assert [line.split()[0] for line in lines[1:]] == list(recipes.RECIPES)
    line = next(line for line in lines if line.startswith("hpm_vit_base_in1k_800e"))
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[1:] == ["HPM, ViT-B/16, ImageNet-1K, 800 epochs", "fine-tune 84.2", "not yet run"]


def test_a_recipe_is_shown_with_the_origin_of_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "mae_vit_base_in1k_200e")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines if line}
    assert "MAE, ViT-B/16, ImageNet-1K, 200 epochs: random masks" in lines[2]
    assert any(line.startswith("deepspeed --module fasthpm.pretrain --recipe mae_vit_base_in1k_200e") for line in lines)
    assert rows["mask_ratio"] == ["0.75", "paper"]
    assert rows["model"] == ["mae_vit_base_patch16_224", "set by this recipe"]
    assert rows["ema_momentum_end"] == ["0.9999", "released code"]
    assert rows["num_workers"] == ["0", "how it is run, not what"]
    assert set(vars(Recipe())) - {"recipe"} <= set(rows)


def test_a_description_tags_what_its_recipe_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    def tagged() -> Recipe:
        """Something with blr 2e-4.

        [paper] mask ratio 0.5, 3 epochs. [released
        code] clip_grad 0 (paper: no word). [ours] the rest, crop min too.
        """
        return Recipe(recipe="tagged", clip_grad=0.0, mask_ratio=0.5, crop_min=0.5, epochs=50, beta1=0.8)

    monkeypatch.setitem(recipes.RECIPES, "tagged", tagged)
    names = ("mask_ratio", "clip_grad", "crop_min", "epochs", "beta1", "alpha_end")
    origins = [listing.origin(tagged(), name).split(",")[0] for name in names]
    assert origins == ["paper", "released code", "ours", "set by this recipe", "set by this recipe", "paper"]


def test_recipes_differ_where_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "hpm_vit_base_in1k_800e", "--diff", "hpm_vit_large_in1k_800e")
    assert [line.split() for line in lines[1:]] == [["model", "hpm_vit_base_patch16_224", "hpm_vit_large_patch16_224"]]
    (tmp_path / "recipe.json").write_text(json.dumps(vars(recipes.debug())))
    same = shown(capsys, "debug", "--diff", str(tmp_path / "recipe.json"))
    assert same == [f"debug and {tmp_path}/recipe.json differ in no field"]
    with pytest.raises(UserError, match="did you mean 'debug'"):
        dispatch(["recipes", "debgu"])
    with pytest.raises(UserError, match="--diff debug needs a recipe to compare with"):
        dispatch(["recipes", "--diff", "debug"])
