"""For programs that run on the null GPU: what they asked of it, and what must be switched off where values are garbage.

Import it first: it refuses to run without the null GPU.
"""

import ctypes
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"K ": "launches", "T ": "launches", "N ": "collectives", "G ": "graphs"}
_NOTE = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_library = ctypes.CDLL(None)  # what is preloaded
try:
    _library.null_counts.restype = ctypes.c_char_p
    _library.null_on_wait.argtypes = [_NOTE]
except AttributeError:
    sys.exit("no null GPU in this process; it is started by tests/helpers/null_gpu.py")


def prepare() -> None:
    """Switch off what cannot work here: cuDNN, which is not faked, and checks of values. This is their one place."""
    from fasthpm import pretrain
    from fasthpm.exchange import exporting
    from fasthpm.probes.online import OnlineProbe
    from fasthpm.ranks.zero import MasterLayout
    from fasthpm.run.metrics import Metrics

    torch.backends.cuda.enable_cudnn_sdp(False)
    off: Any = lambda *_, **__: 0  # noqa: E731
    for owner, name in (
        (MasterLayout, "_check"),  # that the weights are the rounded masters
        (Metrics, "_check"),  # losses that are not finite, or stand out
        (pretrain, "draw_panel"),  # whose masks have the number of patches that they should have
    ):
        getattr(owner, name)  # still there?
        setattr(owner, name, off)
    exporting.compare = lambda *_: (0.0, 1.0)  # of a library's outputs with ours
    finite = torch.Tensor.isfinite  # of weights that are saved or exported; on the device it is counted, not known
    always: Any = lambda x: finite(x) if x.is_cuda else torch.ones_like(x, dtype=torch.bool)  # noqa: E731
    torch.isfinite = torch.Tensor.isfinite = always  # type: ignore[method-assign]
    read = Metrics.read
    Metrics.read = lambda *args, **values: read(*args, **values) or _made_up(*args, **values)  # type: ignore
    OnlineProbe.knn = lambda *_: {"knn_accuracy": 0.0}  # type: ignore[method-assign]  # values choose its rows
    # DeepSpeed's ZeRO 3 formats whole parameters for a log line, which takes minutes with garbage.
    real = torch.Tensor.__repr__
    short: Any = lambda x, **options: f"<{x.dtype} {list(x.shape)}>" if x.is_cuda else real(x, **options)  # noqa: E731
    torch.Tensor.__repr__ = short  # type: ignore[method-assign]


def _made_up(metrics: Any, step: int, epoch: float, teacher_seconds: float, **values: float) -> dict[str, float]:
    """The record of a reading whose count of micro-steps is garbage, too, and came to 0."""
    from fasthpm.step import METRICS

    rates = ("images_per_second", "data_wait_percent", "teacher_percent", "mfu_percent", "memory_gib")
    record = {**dict.fromkeys((*METRICS, "grad_norm", "loss_spikes", *rates), 1.0), **values}
    metrics._tell(step, epoch, record)
    metrics.restart()
    return record


class Watch:
    """While entered: what the program asks of the GPU.

    - `calls`: CUDA calls and kernels by name (runtime.cpp explains the names)
    - `who`: every wait of the host as "call: innermost caller < its caller < …", with its number
    """

    def __enter__(self) -> "Watch":
        self.calls, self.who = Counter[str](), Counter[str]()
        self._note = _NOTE(self._waited)
        torch.cuda.reset_peak_memory_stats()
        _library.null_reset()
        _library.null_on_wait(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        _library.null_on_wait(_NOTE())
        self.calls, self.peak = _calls(), torch.cuda.max_memory_allocated()

    def launches(self) -> int:
        """Kernels so far."""
        return sum(number for name, number in _calls().items() if KINDS.get(name[:2]) == "launches")

    @property
    def kinds(self) -> dict[str, int]:
        """Calls summed by kind: "launches", "collectives", "graphs", "SYNC …" for each wait, all other calls."""
        total: Counter[str] = Counter()
        for name, number in self.calls.items():
            total[KINDS.get(name[:2], name)] += number
        return dict(sorted(total.items()))

    @property
    def summary(self) -> dict[str, Any]:
        """All of it as JSON can hold it; `peak` in bytes of torch's allocator."""
        kinds = self.kinds
        waits = {name: kinds.get(f"SYNC cuda{name.title()}Synchronize", 0) for name in ("device", "stream", "event")}
        copies = {name: number for name, number in kinds.items() if name.startswith("cudaMemcpy")}
        return {
            "launches": kinds.get("launches", 0),
            "graphs": {name: number for name, number in self.calls.items() if name.startswith("G ")},
            "collectives": kinds.get("collectives", 0),
            "waits": waits,
            "who": dict(self.who),
            "copies": copies,
            "peak": self.peak,
        }

    def _waited(self, call: bytes) -> None:
        frame: FrameType | None = sys._getframe(1)
        places: list[str] = []
        while frame and len(places) < 5:
            path = os.path.abspath(frame.f_code.co_filename).split("site-packages/")[-1].removeprefix(f"{ROOT}/")
            if not path.startswith(("torch/", "tests/nullgpu/")):
                places.append(f"{path}:{frame.f_lineno} {frame.f_code.co_name}")
            frame = frame.f_back
        self.who[f"{call.decode()}: {' < '.join(places) or 'no Python of ours'}"] += 1


def _calls() -> Counter[str]:
    lines = _library.null_counts().decode(errors="replace").splitlines()
    return Counter({name: int(number) for number, name in (line.split("\t", 1) for line in lines)})


def report(found: dict[str, Any]) -> NoReturn:
    """Print the one line of JSON, and end at once: libraries need not be torn down."""
    print(json.dumps(found), flush=True)
    sys.stderr.flush()
    os._exit(0)
