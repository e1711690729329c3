"""Which of torch's attention kernels is the fastest on this GPU, timed for every shape that a step has.

The choice is made before anything is compiled or recorded, kept in `layers.PINNED`, and not changed afterwards.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fasthpm import layers
from fasthpm.errors import note_once
from fasthpm.layers import Attended, attended

# In the order of preference: a later one has to be faster by a margin, so that noise does not decide.
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MARGIN = 0.97
REPEATS, ROUNDS = 5, 3

Choice = dict[Attended, str]  # name of the kernel


class Recorder(TorchFunctionMode):
    """While entered: notes the shapes that `layers.attend` is asked for, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Attended, None] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.found[attended(*args[:2])] = None
        return function(*args, **(kwargs or {}))


@contextmanager
def nothing_pinned() -> Iterator[None]:
    """Let torch choose for a while."""
    kept = dict(layers.PINNED)
    layers.PINNED.clear()
    try:
        yield
    finally:
        layers.PINNED.update(kept)


def choose(asked: str, shapes: Iterable[Attended], device: torch.device, known: Mapping[str, str]) -> Choice:
    """The kernel for each shape on a GPU: the one that is `asked` for; with "auto" the one that is `known` by the
    shape's name, else the fastest.

    Where that cannot be, torch chooses, after one line.
    """
    names = [name for name in KERNELS if name != "math" and allowed(name)] if asked == "auto" else [asked]
    choice: Choice = {}
    for shape in shapes:
        tried = [found] if asked == "auto" and (found := known.get(name_of(shape), "")) in KERNELS else names
        seconds = {name: taken for name in tried if (taken := seconds_of(shape, name, device)) is not None}
        choice[shape] = fastest(seconds) or torchs(shape, device)
    if asked != "auto" and (others := {name_of(shape): name for shape, name in choice.items() if name != asked}):
        examples = ", ".join(f"{shape} by {name}" for shape, name in others.items())
        note_once(f"attention_backend {asked} cannot compute all shapes here; torch chooses for {examples}")
    return choice


def fastest(seconds: dict[str, float]) -> str:
    """The name with the least time, or an earlier one that is nearly as fast; "" if there is none."""
    best = ""
    for name, taken in seconds.items():
        best = name if not best or taken < MARGIN * seconds[best] else best
    return best


def allowed(name: str) -> bool:
    """Whether the process has not switched a kernel off."""
    switches = {
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "math": torch.backends.cuda.math_sdp_enabled,
    }
    return bool(switches[name]())


def inputs_of(shape: Attended, device: torch.device) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Random (leaves, (query, key, value)), laid out in memory as `layers.Attention` and `CrossAttention` do it."""
    batch, heads, queries, width = shape.query
    keys, generator = shape.key[2], torch.Generator(device)  # of its own: nobody's random numbers change

    def drawn(*sizes: int) -> Tensor:
        values = torch.randn(batch, *sizes, heads, width, dtype=shape.dtype, device=device, generator=generator)
        return values.requires_grad_(shape.training)

    if queries <= keys:
        qkv = drawn(keys, 3)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        return [qkv], (query[:, :, keys - queries :], key, value)
    asking, known = drawn(queries), drawn(keys, 2)
    key, value = (part.transpose(1, 2) for part in known.unbind(2))
    return [asking, known], (asking.transpose(1, 2), key, value)


def seconds_of(shape: Attended, name: str, device: torch.device) -> float | None:
    """Seconds of one call on a GPU, and of its backward pass if it has one; None if the kernel cannot compute it."""
    leaves, inputs = inputs_of(shape, device)
    gradient: list[Tensor] = []

    def run() -> None:
        out = F.scaled_dot_product_attention(*inputs).transpose(1, 2).flatten(2)
        if shape.training:
            gradient[:] = gradient or [torch.randn_like(out)]
            torch.autograd.grad(out, leaves, gradient[0])

    try:
        with warnings.catch_warnings(), sdpa_kernel(KERNELS[name]), torch.set_grad_enabled(shape.training):
            warnings.simplefilter("ignore")  # torch's reasons why a kernel cannot
            for _ in range(ROUNDS):
                run()
            return min(_timed(run) for _ in range(ROUNDS))
    except RuntimeError:  # no such kernel for these inputs, or no memory for it
        return None


def _timed(run: Any) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / REPEATS


def pin(choice: Choice, device: torch.device) -> None:
    """Let `layers.attend` use what was chosen; a shape for which torch would choose the same costs nothing."""
    for shape, name in choice.items():
        layers.PINNED.pop(shape, None)
        if name != torchs(shape, device):
            layers.PINNED[shape] = KERNELS[name]


def torchs(shape: Attended, device: torch.device) -> str:
    """The kernel that torch itself would take."""
    _, inputs = inputs_of(shape, device)
    taken = torch._fused_sdp_choice(*inputs)
    return next((name for name, kernel in KERNELS.items() if kernel.value == taken), "math")


def name_of(shape: Attended) -> str:
    """A shape for people: batch x heads x tokens x width, `147 of 197` where some of the tokens ask."""
    batch, heads, queries, width = shape.query
    keys = shape.key[2]
    tokens = f"{queries}" if queries == keys else f"{queries} of {keys}"
    kind = str(shape.dtype).removeprefix("torch.")
    return f"{batch} x {heads} x {tokens} x {width} {kind} {'training' if shape.training else 'forward'}"


def named(choice: Choice) -> dict[str, str]:
    """A choice for people and JSON."""
    return {name_of(shape): name for shape, name in choice.items()}
