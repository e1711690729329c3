"""detectron2's published weights are plain pickles of arrays (`.pkl`). They are read here by an unpickler that knows
arrays and plain values only: whatever else a file wants to make or to call ends the reading.
"""

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthpm.errors import UserError


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stands for `codecs.encode`, by which old pickles write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it wants text in {encoding!r}")
    return text.encode("latin1")


# Where these live depends on the release of numpy.
_RECONSTRUCT, _SCALAR = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _RECONSTRUCT for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _BUFFER for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _SCALAR for core in ("core", "_core")},
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return ALLOWED[module, name]


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The weights in a pickle of detectron2's: {"model": {name: array}}, or {name: array}.

    **Raises:** `UserError` for a file that is missing, damaged, or holds more than arrays of numbers and plain values.
    """
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a checkpoint file") from error
    except Exception as error:  # pickle raises nearly anything for damaged files
        raise UserError(f"{path} is no pickle of plain arrays ({error}), so it was not loaded") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"{path} holds no dictionary of weights")
    arrays = {str(name): value for name, value in weights.items() if isinstance(value, np.ndarray)}
    if odd := [name for name, value in arrays.items() if value.dtype.kind not in "fiu"]:
        raise UserError(f"{path} holds arrays that are no numbers: {', '.join(odd[:6])}")
    return {name: torch.from_numpy(value.astype(value.dtype.newbyteorder("="))) for name, value in arrays.items()}
