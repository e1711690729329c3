"""Pickles of arrays, and what may not come with them."""

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthpm.dense.pickles import read_arrays
from fasthpm.errors import UserError

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array(7)}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    content = {"model": collections.OrderedDict(ARRAYS), "__author__": "Detectron2", "iteration": np.float64(3)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_arrays(tmp_path / "x.pkl")
    assert found.keys() == ARRAYS.keys()
    assert all(torch.equal(value, torch.from_numpy(ARRAYS[name])) for name, value in found.items())


def test_old_numpys_names_and_the_other_byte_order(tmp_path: Path) -> None:
    big = ARRAYS["a.weight"].astype(">f4")
    text = pickle.dumps({"a.weight": big}, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core" in text
    (tmp_path / "x.pkl").write_bytes(text)
    assert torch.equal(read_arrays(tmp_path / "x.pkl")["a.weight"], torch.from_numpy(ARRAYS["a.weight"]))


class Calling:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


WRONG: dict[str, tuple[Any, str]] = {
    "a call": ({"model": {"a": Calling(print, "ran")}}, r"it wants to run builtins\.print"),
    "a class": ({"model": io.BytesIO()}, r"it wants to run _io\.BytesIO"),
    "a tensor": ({"model": {"a": torch.ones(1)}}, r"it wants to run torch\._utils"),
    "objects": ({"model": {"a": np.array(["x", None], dtype=object)}}, "arrays that are no numbers: a"),
    "a list": ([1, 2], "no dictionary of weights"),
    "weights that are none": ({"model": 3}, "no dictionary of weights"),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_else_is_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = WRONG[case]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message) as found:
        read_arrays(tmp_path / "x.pkl")
    assert "\n" not in str(found.value)
    assert capsys.readouterr().out == ""


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.pkl cannot be read \(No such file"):
        read_arrays(tmp_path / "x.pkl")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": ARRAYS})[:-20])
    with pytest.raises(UserError, match="is no pickle of plain arrays"):
        read_arrays(tmp_path / "x.pkl")
