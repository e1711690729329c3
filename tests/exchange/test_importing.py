"""Weights that come from other code: they compute what their own code computes, or are refused."""

import argparse
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fasthpm
from fasthpm import files, recipes
from fasthpm.__main__ import dispatch
from fasthpm.checkpoint import weights
from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from fasthpm.exchange.importing import import_weights, write_run
from fasthpm.files import read_file
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from tests.helpers.launch import check_ranks
from tests.helpers.published import (
    DECODER_DEPTH,
    DECODER_HEADS,
    DECODER_WIDTH,
    FLAGS,
    PATCH,
    WIDTH,
    check_same,
    imported_debug,
    prefixed,
    published,
    run_import,
)
from tests.helpers.videomae import their_names
from tests.helpers.videos import tiny


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
        (published(depth=5), r"its encoder is 128 wide with 5 blocks; expected one of 32 x 4 \(pico\), 128 x 4"),
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
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")  # as users have it, not as errors that are caught
        with pytest.raises(UserError, match=expected) as caught:
            run_import(path, tmp_path / "run", *FLAGS)
    assert [str(warning.message) for warning in warned] == []
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
        ("empty", "is empty; copy or download it again"),
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
    with pytest.raises(UserError, match="is a file, and a folder is written"):
        write_run(tmp_path / "file", imported, {})


# -------------------------------------------------------------------------------------------------- further pretraining
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


# -------------------------------------------------------------------------------------------------- videos
def test_a_full_videomae_checkpoint_becomes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-B's keys and shapes, in half precision, with the arguments that the trainer stores."""
    torch.manual_seed(0)
    model = fasthpm.create_model("videomae_vit_base_patch16_224").half()
    stored = argparse.Namespace(num_frames=16, input_size=224, normlize_target=True, mask_ratio=0.8, sampling_rate=4)
    torch.save({"model": {f"module.{k}": v for k, v in their_names(model).items()}, "args": stored}, tmp_path / "b.pth")
    dispatch(["import", str(tmp_path / "b.pth"), "-o", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "videomae checkpoint: base, patches of 16, 16 frames of 224x224x3, decoder 384 x 4" in said
    assert "assumed    12 heads, decoder_heads 6: not told by the shapes" in said
    assert "told       sampling_rate 4, mask_ratio 0.8, norm_pix_loss True: by the arguments in the file" in said
    again, recipe = weights.load_weights(tmp_path / "run")
    assert (recipe.model, recipe.mask_policy, recipe.num_masked) == ("videomae_vit_base_patch16_224", "tube", 1248)
    assert (recipe.sampling_rate, recipe.mask_ratio) == (4, 0.8)
    assert (recipe.norm_pix_loss, recipe.decoder_heads, recipe.tubelet_size) == (True, 6, 2)
    want = {name: value.float() for name, value in model.state_dict().items() if not name.endswith("pos_embed")}
    for name, value in want.items():
        if name.endswith("qkv.bias"):
            value[len(value) // 3 : 2 * len(value) // 3] = 0
        assert torch.equal(again.state_dict()[name], value), name


def test_imports_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = their_names(model_of(tiny()))

    def refused(message: str, changed: dict[str, Tensor], *flags: str) -> None:
        save_file({key: value.clone() for key, value in changed.items()}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=message):
            dispatch(["import", str(tmp_path / "x.safetensors"), "-o", str(tmp_path / "run"), *flags])

    heads, size = ["--decoder_heads", "2"], ["--input_size", "16", "--num_frames", "8"]
    refused("decoders are 32 wide, and shapes do not tell their number of heads", state, *size)
    lacking = {key: value for key, value in state.items() if not key.endswith("0.attn.v_bias")}
    refused(r"missing \['blocks.0.attn.qkv.bias'", lacking, *heads, *size)
    flat = {**state, "encoder.patch_embed.proj.weight": torch.zeros(128, 3, 8, 8)}
    refused("source videomae: these are an image model's weights", flat, *heads, *size)
    refused("of another model: .*tubelet_size", state, "--recipe", "mae_vit_base_in1k_200e")


def test_an_encoder_of_a_finetuned_videomae_is_taken(tmp_path: Path) -> None:
    """Classifiers have no prefix, and normalise the mean of the tokens (fc_norm) in place of the tokens."""
    model = model_of(tiny())
    state = {k.removeprefix("encoder."): v for k, v in their_names(model).items() if k.startswith("encoder.")}
    state |= {f"fc_norm.{k}": state.pop(f"norm.{k}") for k in ("weight", "bias")} | {"head.weight": torch.zeros(5, 128)}
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "ft.safetensors")
    flags = ("--encoder_only", "--input_size", "16", "--num_frames", "8")
    dispatch(["import", str(tmp_path / "ft.safetensors"), "-o", str(tmp_path / "run"), *flags])
    clips = torch.randn(1, 3, 8, 16, 16)
    torch.testing.assert_close(weights.load_weights(tmp_path / "run")[0].encode(clips), model.encode(clips))
