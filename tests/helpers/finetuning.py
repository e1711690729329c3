"""Commands of the probes, run and refused, and their arguments."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasthpm.errors import UserError
from fasthpm.ranks import launch
from tests.helpers.data_fixtures import picture

FLOAT32 = ("--deepspeed_config", "ds_configs/zero1_fp32.json")


def start(command: Any, *words: object) -> Any:
    """Run a command in this process; its result."""
    return command.main([str(word) for word in words])


def refused(command: Any, *words: object) -> str:
    """The one line with which a command refuses its arguments."""
    try:
        with pytest.raises(UserError) as caught:
            start(command, *words)
    finally:
        launch.finish()  # a process would end here
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def same_weights(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


SHORT = (
    "--recipe",
    "debug",
    "--data_path",
    "synthetic:64",
    "--epochs",
    "1",
    "--warmup_epochs",
    "0",
    "--panel_every",
    "0",
    "--batch_size",
    "16",
    "--deepspeed_config",
    "ds_configs/zero1_fp32.json",
    "--log_every",
    "2",
)
DATA = ("--train_path", "synthetic:48", "--val_path", "synthetic:21")


def flat_folder(folder: Path) -> Path:
    folder.mkdir()
    for index in range(20):
        picture(index, (28, 28), grey=True).save(folder / f"{index}.png")
    return folder
