"""The walks of docs/own_images.md, command by command as the page has them, on small generated files."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers import rasters
from tests.helpers.launch import ROOT
from tests.helpers.pages import entry_point

PAGE = ROOT / "docs" / "own_images.md"
WALK = re.compile(r"^### (\w+)[^\n]*\n(.*?)(?=^##)", flags=re.MULTILINE | re.DOTALL)
FILES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "Satellite": ("tiles", lambda folder: rasters.satellite(folder, 28)),
    "Microscopy": ("slides", lambda folder: rasters.slides(folder, 8, size=160)),
    "X": ("xrays", lambda folder: rasters.xrays(folder, 28)),
}


def commands_of(text: str) -> list[str]:
    """The indented lines, continued ones joined."""
    lines = [line[4:].strip() for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    return [line for line in lines if line]


WALKS = {name: commands_of(text) for name, text in WALK.findall(PAGE.read_text())}


def test_the_page_has_the_three_walks() -> None:
    assert list(WALKS) == list(FILES)
    for lines in WALKS.values():
        steps = [line.split()[2 if line.startswith("python") else 1] for line in lines]
        assert steps[:4] == ["data_prep.images", "data_prep.verify", "pretrain", "visualize"]
        assert "knn" in steps[4:]


@pytest.mark.parametrize("name", FILES)
def test_a_walk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, make = FILES[name]
    make(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    results: dict[str, Any] = {}
    for line in WALKS[name]:
        main, arguments = entry_point(shlex.split(line))
        results[arguments[0]] = main(arguments)
    sidecar = json.loads((tmp_path / f"{folder}.json").read_text())
    assert sidecar["dtype"] == "uint16"
    assert sidecar["channels"] == {"tiles": 12, "slides": 5, "xrays": 1}[folder]
    panel = tmp_path / f"{folder}.png"
    with Image.open(panel) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.std() > 20  # no dark rectangle
    (result,) = (tmp_path / "runs" / folder).glob("knn_*.json")
    assert max(json.loads(result.read_text())["accuracy"].values()) >= 50
