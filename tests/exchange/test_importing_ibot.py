"""A checkpoint of iBOT's code: its encoder comes in by name, its head is refused by name."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from fasthpm.exchange.importing import main
from fasthpm.model import create_model

ENCODER = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm.")


def ibot_file(path: Path) -> dict[str, Tensor]:
    """Student and teacher as iBOT's trainer saves them; the teacher's encoder by our names."""
    torch.manual_seed(0)
    made = create_model("mae_vit_tiny_patch4_28", decoder_depth=1).state_dict()
    encoder = {name: value + 0.01 for name, value in made.items() if name.startswith(ENCODER)}
    head = {"mlp.0.weight": torch.randn(8, 192), "last_layer.weight_g": torch.ones(6, 1)}
    whole = {f"backbone.{name}": value for name, value in (encoder | {"masked_embed": torch.zeros(1, 192)}).items()}
    whole |= {f"head.{name}": value for name, value in head.items()}
    torch.save({"student": {f"module.{name}": value * 2 for name, value in whole.items()}, "teacher": whole}, path)
    return encoder


def test_the_teachers_encoder_comes_in(tmp_path: Path) -> None:
    encoder = ibot_file(tmp_path / "ibot.pth")
    ignored = ("--ignore", "head.", "backbone.masked_embed")
    main([str(tmp_path / "ibot.pth"), "-o", str(tmp_path / "run"), "--encoder_only", "--weights", "teacher", *ignored])
    model, _ = load_weights(tmp_path / "run")
    found = model.state_dict()
    for name, value in encoder.items():
        assert torch.equal(found[name], value), name


def test_the_head_is_refused_by_name(tmp_path: Path) -> None:
    ibot_file(tmp_path / "ibot.pth")
    with pytest.raises(UserError, match=r"head\.mlp\.0\.weight, head\.last_layer\.weight_g: leave these out"):
        main([str(tmp_path / "ibot.pth"), "-o", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
