"""Random streams: no two share a key."""

import ast

import pytest

from fasthpm.data.keys import Stream
from tests.helpers.launch import ROOT

# What runs and prepared sets were drawn with; a number here never changes.
NUMBERS = {
    "PREPARATION": 0,
    "ORDER": 1,
    "CROP": 2,
    "COLOUR": 3,
    "SPARE": 4,
    "BLOCKS": 5,
    "CLIP": 6,
    "SEGMENTS": 7,
    "AUGMENT": 8,
    "REPEAT": 9,
    "TURN": 10,
    "CHANNELS": 11,
    "GROUPS": 2**32,
    "PROPORTION": 2**32 + 1,
    "SPLIT": 2**33,
}


def test_all_keys_differ_and_stay() -> None:
    assert {name: int(stream) for name, stream in Stream.__members__.items()} == NUMBERS
    assert len(set(NUMBERS.values())) == len(NUMBERS)


@pytest.mark.parametrize("package", ["fasthpm", "data_prep", "bench"])
def test_every_key_names_its_stream(package: str) -> None:
    """A number written at the call would be in nobody's list."""
    calls = [
        (path.name, node.lineno, ast.unparse(node.args[2]))
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "key_of"
    ]
    assert [call for call in calls if not call[2].startswith("Stream.")] == []
    assert calls or package == "bench"
