"""iBOT's checkpoints: what the run computes is what plain code over their names computes, of encoder and head."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from tests.helpers.published import WIDTH, Published, published, run_import

PROTOTYPES, HIDDEN, NECK, PATCHES = 7, 24, 256, 9
ENCODER = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm.")


def ibots(seed: int, *, lengths: bool = False, shared: bool = True) -> dict[str, Tensor]:
    """Random weights under iBOT's names: a backbone, and a head whose last layer is a `weight_norm`."""
    torch.manual_seed(seed)
    backbone = {k: v for k, v in published(predictor=False, seed=seed).items() if k.startswith(ENCODER)}
    backbone |= {"pos_embed": torch.randn(1, 1 + PATCHES, WIDTH), "masked_embed": torch.randn(1, WIDTH)}
    head = {"last_layer.weight_g": 1 + torch.rand(PROTOTYPES, 1) * lengths}
    head["last_layer.weight_v"] = torch.randn(PROTOTYPES, NECK)
    for number, (rows, columns) in {0: (HIDDEN, WIDTH), 2: (HIDDEN, HIDDEN), 4: (NECK, HIDDEN)}.items():
        head |= {f"mlp.{number}.weight": torch.randn(rows, columns), f"mlp.{number}.bias": torch.randn(rows)}
    for kind in ("weight_g", "weight_v"):
        head[f"last_layer2.{kind}"] = head[f"last_layer.{kind}"] + (0 if shared else 1)
    return {f"backbone.{k}": v for k, v in backbone.items()} | {f"head.{k}": v for k, v in head.items()}


def ibot_file(path: Path, **options: Any) -> dict[str, dict[str, Tensor]]:
    """Student, teacher and centres as iBOT's trainer saves them."""
    both = {"student": ibots(1, **options), "teacher": ibots(2, **options)}
    centres = {"center": torch.randn(1, PROTOTYPES), "center2": torch.randn(1, 1, PROTOTYPES)}
    student = {f"module.{key}": value for key, value in both["student"].items()}
    torch.save({"student": student, "teacher": both["teacher"], "epoch": 3, "ibot_loss": centres}, path)
    return {**both, "centres": centres}


def slow(state: dict[str, Tensor], images: Tensor, mask: Tensor) -> Tensor:
    """Logits of all tokens, [B, 1 + L, K]: iBOT's forward pass, image by image."""
    plain = Published({key.removeprefix("backbone."): value for key, value in state.items()})
    weights, found = plain.state, []
    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    for image, hidden in zip(images, mask, strict=True):
        tokens = F.conv2d(image[None], kernel, bias, stride=kernel.shape[-1])[0].flatten(1).T
        tokens[hidden] = weights["masked_embed"][0]
        tokens = torch.cat([weights["cls_token"][0], tokens]) + weights["pos_embed"][0]
        tokens = plain.norm("norm", plain.blocks("blocks", tokens, 4))
        for number in (0, 2):
            tokens = F.gelu(plain.layer(f"head.mlp.{number}", tokens))
        tokens = plain.layer("head.mlp.4", tokens)
        tokens = tokens / tokens.square().sum(-1, keepdim=True).sqrt()
        rows = weights["head.last_layer.weight_v"]
        lengths = weights["head.last_layer.weight_g"] / rows.square().sum(1, keepdim=True).sqrt()
        found.append(tokens @ (rows * lengths).T)
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [False, True])
def test_the_run_computes_what_ibot_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str], lengths: bool) -> None:
    content = ibot_file(tmp_path / "ibot.pth", lengths=lengths)
    run_import(tmp_path / "ibot.pth", tmp_path / "run")
    images, mask = torch.randn(2, 3, 12, 12, dtype=torch.float64), torch.rand(2, PATCHES) < 0.4
    for which in ("student", "teacher"):
        model, recipe = load_weights(tmp_path / "run", which)
        model = model.double()
        got = model.decoder_pred(model.encode_in_place(model.patchify(images), mask))
        torch.testing.assert_close(got, slow(content[which], images, mask))
    assert (recipe.model, recipe.target, recipe.positions) == ("ibot_vit_nano_patch4_28", "distributions", "learned")
    assert (recipe.prototypes, recipe.head_hidden, recipe.head_free_norm) == (PROTOTYPES, HIDDEN, lengths)
    kept = load_file(next((tmp_path / "run/checkpoints").glob("step-*")) / "buffers.safetensors")["centres"]
    assert torch.equal(kept, torch.cat([content["centres"][name].flatten()[None] for name in ("center", "center2")]))
    output = capsys.readouterr().out
    assert "ibot checkpoint: nano" in output
    assert "7 prototypes behind layers of 24" in output
    assert "centres    kept" in output


def test_without_its_loss_the_centres_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"teacher": ibots(2)}, tmp_path / "ibot.pth")
    run_import(tmp_path / "ibot.pth", tmp_path / "run")
    assert "centres    not in the file: zeros" in capsys.readouterr().out
    assert not list((tmp_path / "run").rglob("buffers.safetensors"))


@pytest.mark.parametrize("ignore", [(), ("--ignore", "head.", "backbone.masked_embed")], ids=["whole", "ignored"])
def test_the_teachers_encoder_comes_in(tmp_path: Path, ignore: tuple[str, ...]) -> None:
    teacher = ibot_file(tmp_path / "ibot.pth", shared=False)["teacher"]
    run_import(tmp_path / "ibot.pth", tmp_path / "run", "--encoder_only", "--weights", "teacher", *ignore)
    model, _ = load_weights(tmp_path / "run")
    found = model.state_dict()
    encoder = {k.removeprefix("backbone."): v for k, v in teacher.items() if k.startswith("backbone.")}
    del encoder["masked_embed"]
    assert all(torch.equal(found[name], value) for name, value in encoder.items())


def test_a_head_of_its_own_for_patches_is_refused(tmp_path: Path) -> None:
    ibot_file(tmp_path / "ibot.pth", shared=False)
    with pytest.raises(UserError, match=r"one last layer for cls and another for patches.*take its encoder with --enc"):
        run_import(tmp_path / "ibot.pth", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_head_is_refused_by_name(tmp_path: Path) -> None:
    """One with normalised layers, whose numbers differ."""
    state = ibots(2)
    state["head.mlp.6.weight"] = state.pop("head.mlp.4.weight")
    torch.save({"teacher": state}, tmp_path / "ibot.pth")
    with pytest.raises(UserError, match=r"missing \['decoder_pred.mlp.4.weight'\]; unexpected .*mlp.6.weight"):
        run_import(tmp_path / "ibot.pth", tmp_path / "run")
