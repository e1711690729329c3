"""What the program never does with what others wrote, and whom it listens to: read from its sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT

SOURCES = [path for room in ("fasthpm", "data_prep", "bench") for path in sorted((ROOT / room).rglob("*.py"))]
TOLD = [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/*"), ROOT / "Makefile"]
RESTRICTED = "data_prep/torchvision_sets.py"  # its unpickler knows arrays and plain values only


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(name as it is written, call) of every call in a source file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    """Checkpoints, ours and others', are safetensors or read with `weights_only`; DeepSpeed's are not used."""
    for name, call in calls(path):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name == "torch.load":
            assert given.get("weights_only") == "True"
        assert given.get("allow_pickle", "False") == "False"
        assert not name.endswith((".save_checkpoint", ".load_checkpoint"))
        assert not name.startswith(("pickle.load", "dill.", "joblib.load")) or RESTRICTED in str(path)


def test_servers_listen_to_this_machine_alone() -> None:
    told = [(path.name, line) for path in TOLD for line in path.read_text().splitlines() if "--logdir" in line]
    assert {name for name, _ in told} >= {"pretrain.py", "demo.sh", "video_demo.sh"}
    assert [(name, line) for name, line in told if "--host 127.0.0.1" not in line] == []
    assert [path.name for path in TOLD if "0.0.0.0" in path.read_text() or "bind_all" in path.read_text()] == []
