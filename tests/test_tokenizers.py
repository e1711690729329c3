"""Tokenizers: k-means against a loop, DALL-E's against transformers, BEiT v2's against timm; files that don't fit."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fasthpm import frozen, recipes
from fasthpm.commands.dry_run import dry_run
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.speed import flops
from fasthpm.speed.gpus import GPUS
from fasthpm.tokenizers import DVAE, SOFTENING, Codebook, nearest, save_codebook, untrained_tokenizer
from tests.helpers.features import images

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def toy(weights: str, tokens: int, **changes: Any) -> Recipe:
    """BEiT on 16 patches of 4 x 4 in colour."""
    fields = {"model": "beit_vit_nano_patch4_28", "input_size": "16", "channels": 3, "predict_loss": "none"}
    fields |= {"mask_policy": "random", "mask_ratio": 0.38, "target": "tokens"}
    fields |= {"target_weights": weights, "target_dim": tokens, **changes}
    return dataclasses.replace(recipes.debug(), **fields)


def built(recipe: Recipe, dtype: torch.dtype = torch.float32) -> Any:
    return frozen.build_frozen(recipe, CPU, dtype)


# -------------------------------------------------------------------------------------------------- k-means
def codebook(tokens: int = 6, side: int = 4, channels: int = 3) -> Codebook:
    torch.manual_seed(3)
    return Codebook(torch.randn(tokens, side * side * channels), side, (0.4,) * channels, (0.2,) * channels)


def kmeans(path: Path, book: Codebook) -> str:
    save_codebook(book, path, {})
    return f"kmeans:{path}"


def test_k_means_gives_the_nearest_code(tmp_path: Path) -> None:
    book = codebook()
    tokenizer = built(toy(kmeans(tmp_path / "book.safetensors", book), 6), torch.bfloat16)
    pixels = images()
    pixels[0, :4, :4] = 7  # flat
    ids = tokenizer(pixels)
    assert (ids.dtype, ids.shape) == (torch.int64, (3, 16))
    for picture, row in zip(pixels, ids.tolist(), strict=True):
        for place, token in enumerate(row):
            top, left = 4 * (place // 4), 4 * (place % 4)
            values = (picture[top : top + 4, left : left + 4].double().flatten() / 255 - 0.4) / 0.2
            values = (values - values.mean()) / (values.var() + SOFTENING).sqrt()
            distances = [float((values - code).square().sum()) for code in book.codes.double()]
            assert token == distances.index(min(distances))
    assert len(ids.unique()) > 2


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, codes = torch.randn(11, 5), torch.randn(4, 5)
    want = torch.cdist(rows, codes).argmin(dim=1)
    monkeypatch.setattr("fasthpm.tokenizers.BLOCK_ELEMENTS", 8)
    assert torch.equal(nearest(rows, codes), want)


def test_a_code_is_drawn_with_the_patchs_own_contrast() -> None:
    """The code of a patch that is a code gives that patch back."""
    book = codebook(tokens=16)
    patches = book.normalised(book.cut(images(1)))
    book.codes = patches[0]
    raw = torch.randn(1, 16, 1) + torch.rand(1, 16, 1) * patches
    again = (raw - raw.mean(2, keepdim=True)) * (raw.var(2, keepdim=True) + SOFTENING).rsqrt()
    book.codes = again[0]
    torch.testing.assert_close(book.pictures(torch.arange(16)[None], raw), raw, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "side", "channels", "problem"),
    [
        (5, 4, 3, "the tokenizer has 5 tokens, and the model predicts 6; use --target_dim 5"),
        (6, 8, 3, "its codes are of 8 x 8 pixels in 3 channels, and the recipe's patches of 4 x 4 in 3"),
        (6, 4, 1, "in 1 channels, and the recipe's patches of 4 x 4 in 3; make one .* --patch_size 4 --channels 3"),
    ],
)
def test_a_codebook_of_something_else_is_refused(
    tmp_path: Path, tokens: int, side: int, channels: int, problem: str
) -> None:
    weights = kmeans(tmp_path / "book.safetensors", codebook(tokens, side, channels))
    with pytest.raises(UserError, match=problem) as caught:
        built(toy(weights, 6))
    assert "book.safetensors" in str(caught.value)


class Evil:
    """Says so if it is loaded."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code ran')",)


def test_files_that_are_no_tokenizers_are_refused_and_not_run(tmp_path: Path) -> None:
    evil = tmp_path / "encoder.pkl"
    evil.write_bytes(pickle.dumps(Evil()))
    torch.save({"quantize": Evil()}, tmp_path / "evil.pth")
    save_file({"codes": torch.zeros(6, 48)}, tmp_path / "plain.safetensors")
    problems = {
        "": "target tokens needs a tokenizer, and target_weights names none; expected kmeans:FILE",
        f"kmeans:{tmp_path / 'no.safetensors'}": "there is no such file; python -m data_prep.codebook makes one",
        f"vqkd:{tmp_path / 'no.pth'}": rf"^{tmp_path / 'no.pth'} cannot be read \(No such file",
        f"kmeans:{tmp_path / 'plain.safetensors'}": "is no codebook; expected what python -m data_prep.codebook",
        f"kmeans:{evil}": "is damaged, or not a file of torch.save|needs Python code",
        f"vqkd:{evil}": "is damaged, or not a file of torch.save|needs Python code",
        f"vqkd:{tmp_path / 'evil.pth'}": "needs Python code to load .* so it was not loaded",
        f"vqkd:{tmp_path / 'plain.safetensors'}": "has no quantize.embedding.weight",
        f"dvae:{evil}": "OpenAI's own encoder.pkl is a program, which is never run",
    }
    for weights, problem in problems.items():
        with pytest.raises(UserError, match=problem):
            built(toy(weights, 6))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"target_weights": "book.safetensors"}, "expected one of kmeans:PATH, dvae:PATH, vqkd:PATH"),
        ({"target_weights": "clip:x"}, "expected one of kmeans:PATH"),
        ({"target_weights": "dvae:x", "target_model": "test_vit"}, "is the encoder of a vqkd tokenizer"),
        ({"target_weights": "kmeans:x", "pixel_loss": "l1"}, "target tokens compares no pixels"),
        ({"model": "hpm_vit_nano_patch8_32_video", "num_frames": 16, "tubelet_size": 2}, "target tokens is for images"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        dataclasses.replace(toy("", 6), **changes)


# -------------------------------------------------------------------------------------------------- DALL-E's
def dalle(folder: Path, **changes: Any) -> Any:
    """A small encoder with random weights, saved."""
    torch.manual_seed(0)
    config = transformers.FlavaImageCodebookConfig(hidden_size=8, vocab_size=12, num_blocks_per_group=1, **changes)
    model = transformers.FlavaImageCodebook(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("channels", [3, 1])
def test_the_dvae_is_transformers(tmp_path: Path, channels: int) -> None:
    """At 8 pixels per token, by torch's own resize, pixels moved away from 0 and 1."""
    theirs = dalle(tmp_path / "dvae")
    tokenizer = built(toy(f"dvae:{tmp_path / 'dvae'}", 12, channels=channels))
    pixels = images(channels=channels)
    large = F.interpolate(pixels.permute(0, 3, 1, 2).float(), (32, 32), mode="bicubic", antialias=True).clamp(0, 255)
    want = theirs.get_codebook_indices((0.8 * large / 255 + 0.1).expand(-1, 3, -1, -1)).flatten(1)
    got = tokenizer(pixels)
    assert torch.equal(got, want)
    assert len(got.unique()) > 1
    assert not any(weight.requires_grad for weight in tokenizer.parameters())
    assert built(tokenizer_recipe(tmp_path, channels), torch.bfloat16)(pixels).shape == (3, 16)


def tokenizer_recipe(folder: Path, channels: int) -> Recipe:
    return toy(f"dvae:{folder / 'dvae'}", 12, channels=channels)


def test_a_dvae_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dvae"
    model = dalle(folder)
    with pytest.raises(UserError, match="the tokenizer has 12 tokens, and the model predicts 13"):
        built(toy(f"dvae:{folder}", 13))
    (folder / "config.json").write_text('{"hidden_size": 16, "vocab_size": 12, "num_blocks_per_group": 1}')
    with pytest.raises(UserError, match=r"the weights do not fit its config.json: .* wrong shape"):
        built(toy(f"dvae:{folder}", 12))
    with pytest.raises(UserError, match="reads colour images, and channels is 2"):
        DVAE(dataclasses.replace(toy("", 12), channels=2), model)


def test_the_dvaes_cost_is_counted() -> None:
    """The research note measured 52.1 GFLOP per image of 224 pixels."""
    recipe = recipes.from_name("beit_vit_base_in1k_800e")
    with torch.device("meta"):
        model = model_of(recipe)
    config = transformers.FlavaImageCodebookConfig()
    with torch.device("meta"):
        tokenizer = DVAE(recipe, transformers.FlavaImageCodebook(config))
    assert flops.frozen_flops(tokenizer, 196) == pytest.approx(52.1e9, rel=0.02)
    more = flops.step_flops(model, recipe, tokenizer)["total"] - flops.step_flops(model, recipe)["total"]
    assert more == pytest.approx(52.1e9, rel=0.02)


# -------------------------------------------------------------------------------------------------- BEiT v2's
def beit2(path: Path, **dropped: Any) -> Any:
    """A small VQ-KD with random weights in a file as BEiT v2 names them; the parts by which it is computed."""
    torch.manual_seed(1)
    vit = timm.create_model("test_vit", img_size=64, num_classes=0, global_pool="avg").eval()
    for weight in vit.parameters():
        weight.data.normal_(std=0.2)
    head = [torch.randn(64, 64) * 0.2, torch.randn(64), torch.randn(32, 64) * 0.2, torch.randn(32)]
    codes = torch.randn(10, 32)
    state: dict[str, Tensor] = {}
    for key, value in vit.state_dict().items():
        if key.endswith("qkv.bias"):
            value[64:128] = 0  # theirs has no biases of the keys
            state[f"encoder.{key.removesuffix('qkv.bias')}q_bias"] = value[:64].clone()
            state[f"encoder.{key.removesuffix('qkv.bias')}v_bias"] = value[128:].clone()
        else:
            state[f"encoder.{key}"] = value
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    state |= {f"encode_task_layer.{name}": value for name, value in zip(names, head, strict=True)}
    state |= {"quantize.embedding.weight": codes, "quantize.cluster_size": torch.ones(10)}
    state |= {"decoder.blocks.0.norm1.weight": torch.ones(4), "decode_task_layer.0.bias": torch.ones(4)}
    torch.save({"model": {key: value for key, value in state.items() if key not in dropped}}, path)
    return vit, head, codes


def test_vq_kd_gives_the_nearest_direction(tmp_path: Path) -> None:
    vit, head, codes = beit2(tmp_path / "vqkd.pth")
    recipe = toy(f"vqkd:{tmp_path / 'vqkd.pth'}", 10, input_size="64", patch_size=16, target_model="test_vit")
    pixels = images(side=64)
    got = built(recipe)(pixels)
    with torch.no_grad():
        tokens = vit.fc_norm(vit.forward_features(pixels.permute(0, 3, 1, 2) / 127.5 - 1)[:, 1:])
        found = F.linear(F.linear(tokens, head[0], head[1]).tanh(), head[2], head[3])
        want = F.cosine_similarity(found[:, :, None], codes, dim=-1).argmax(dim=2)
    assert torch.equal(got, want)
    assert len(got.unique()) > 1


def test_a_vq_kd_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    beit2(tmp_path / "vqkd.pth")
    weights, sizes = f"vqkd:{tmp_path / 'vqkd.pth'}", {"input_size": "64", "patch_size": 16, "target_model": "test_vit"}
    with pytest.raises(UserError, match=r"not of a VQ-KD with the encoder vit_tiny_patch16_224: .*wrong"):
        built(toy(weights, 10, **{**sizes, "target_model": "vit_tiny_patch16_224"}))
    with pytest.raises(UserError, match="cuts an image of 16 into 1 x 1 patches of 16, the student into 4 x 4 of 4"):
        built(toy(weights, 10, target_model="test_vit"))
    beit2(tmp_path / "vqkd.pth", **{"encode_task_layer.0.bias": 0})
    with pytest.raises(UserError, match=r"1 missing: head\.0\.bias"):
        built(toy(weights, 10, **sizes))


def test_a_plan_counts_the_tokenizer() -> None:
    """What a step costs without a file: the kind alone tells it; k-means costs next to nothing."""
    recipe = toy("kmeans:x", 10, input_size="64", patch_size=16, batch_size=2)
    large = dataclasses.replace(recipe, target_weights="vqkd:x", target_model="test_vit")
    gpu = next(iter(GPUS.values()))
    plain, costly = dry_run(recipe, gpu), dry_run(large, gpu)
    tokenizer = untrained_tokenizer(large, torch.float32)
    assert plain.frozen_parameters == 0
    assert costly.frozen_parameters == sum(weight.numel() for weight in tokenizer.parameters())  # type: ignore[union-attr]
    assert costly.flop - plain.flop == pytest.approx(2 * flops.frozen_flops(tokenizer, 16), rel=0.05)
