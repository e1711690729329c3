"""A step that computes nothing: torch's own operations on tensors without values, counted as a GPU would run them.

Every operation of a forward and backward pass of `Step` is dispatched as in training, eagerly; what it allocates is
held and freed as the real one would be. That gives the peak of the memory and, with a roofline for every operation,
a model of the time: neither is a measurement, and both follow the code as it is.
"""

import dataclasses
import math
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fasthpm.data import DatasetInfo
from fasthpm.frozen import untrained_teacher
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.speed.gpus import GPU
from fasthpm.step import Step
from fasthpm.targets import TARGETS
from fasthpm.tokenizers import untrained_tokenizer
from fasthpm.views import inputs_of, step_of

BLOCK = 512  # bytes: the allocator rounds up to it
FREE = frozenset({  # operations that launch no kernel
    "alias", "as_strided", "detach", "expand", "lift_fresh", "movedim", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "_reshape_alias", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "is_same_size", "record_stream",
})  # fmt: skip


class Held(NamedTuple):
    """Tensors of one kind that are in memory at its peak."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    number: int
    bytes: int  # of all of them


@dataclass(frozen=True)
class DryRun:
    """What a step of one GPU comes to."""

    activations: float  # bytes: peak beside weights and optimizer
    kernels: int  # of forward and backward
    flop: float
    moved: float  # bytes of memory traffic
    seconds: float  # by the GPU's roofline, forward and backward
    parameters: int  # of the student, trainable
    teacher_parameters: int
    frozen_parameters: int  # of a teacher that does not learn
    held: tuple[Held, ...]  # the activations at the peak that grow with the batch, largest first


class Meter(TorchDispatchMode):
    """Counts what operations on tensors without values would do on `gpu`."""

    def __init__(self, gpu: GPU) -> None:
        super().__init__()
        self.gpu = gpu
        self.live = self.peak = 0.0
        self.kernels, self.flop, self.moved, self.seconds = 0, 0.0, 0.0, 0.0
        self.at_peak: list[Held] = []  # every tensor by itself, as it was first seen
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._alive: dict[int, Held] = {}
        self._number, self._climbing = 0, False

    def know(self, module: nn.Module) -> None:
        """Leave a module's weights out of what is counted."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        for tensor in _tensors(out):
            self._hold(tensor)
        if packet.__name__ not in FREE and function.namespace != "prim":
            moved = sum(map(_touched, _tensors((args, kwargs, out))))
            flop = _flop(packet, args, kwargs or {}, out)
            self.kernels += 1
            self.flop, self.moved = self.flop + flop, self.moved + moved
            self.seconds += self.gpu.seconds(flop, moved)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._known.add(storage)
            self._number += 1
            self._alive[self._number] = Held(tuple(tensor.shape), tensor.dtype, 1, size)
            self.live += size
            if self.live > self.peak:
                self.peak, self._climbing = self.live, True
            weakref.finalize(storage, self._free, self._number)

    def _free(self, number: int) -> None:
        if self._climbing:
            self.at_peak, self._climbing = list(self._alive.values()), False
        self.live -= self._alive.pop(number).bytes


def _flop(packet: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Of matrix products and fused attention; torch counts all but a CPU's attention, which stands for a GPU's."""
    if packet.__name__ == "_scaled_dot_product_flash_attention_for_cpu":
        return float(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet.__name__ == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return float(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    count = flop_registry.get(packet)
    return float(count(*args, **kwargs, out_val=out)) if count else 0.0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor; what is expanded counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride or not size)


def dry_run(recipe: Recipe, gpu: GPU, *, bf16: bool = True) -> DryRun:
    """One micro-step of `recipe.batch_size` samples, forward and backward, as `gpu` would run it.

    - `bf16`: the forward pass is in bfloat16, else in float32
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Meter(gpu) as meter:
        step, teacher = step_without_values(recipe, torch.bfloat16 if bf16 else torch.float32)
        student = step.student
        for module in (step, teacher, step.frozen):
            if module is not None:
                meter.know(module)
        meter.live = meter.peak = meter.flop = meter.moved = meter.seconds = 0.0
        meter.kernels = 0
        _train(step)
    weights = {
        shape for weight in student.parameters() for shape in (tuple(weight.shape), tuple(reversed(weight.shape)))
    }
    return DryRun(
        activations=meter.peak,
        kernels=meter.kernels,
        flop=meter.flop,
        moved=meter.moved,
        seconds=meter.seconds,
        parameters=sum(weight.numel() for weight in student.parameters() if weight.requires_grad),
        teacher_parameters=_count(teacher),
        frozen_parameters=_count(step.frozen),
        held=_by_kind(
            one
            for one in meter.at_peak
            if one.shape not in weights and one.shape and math.prod(one.shape) % recipe.batch_size == 0
        ),
    )


def _by_kind(tensors: Iterable[Held]) -> tuple[Held, ...]:
    """Those of a shape and type together, the most bytes first."""
    sums: dict[tuple[tuple[int, ...], torch.dtype], Held] = {}
    for one in tensors:
        kind = one.shape, one.dtype
        before = sums.get(kind, Held(*kind, 0, 0))
        sums[kind] = Held(*kind, before.number + one.number, before.bytes + one.bytes)
    return tuple(sorted(sums.values(), key=lambda held: -held.bytes))


def step_without_values(recipe: Recipe, dtype: torch.dtype) -> tuple[Step, HPMViT | None]:
    """The recipe's eager step, which measures no time, and its teacher; made where fake tensors are in force."""
    recipe = dataclasses.replace(recipe, compile=False)
    info = DatasetInfo(1 << 20, recipe.channels, (0.5,) * recipe.channels, (0.25,) * recipe.channels, ("",))
    step, teacher = step_of(_model(recipe, dtype), recipe, info), None
    step.stopwatch = SimpleNamespace(measure=lambda device: nullcontext())  # type: ignore[assignment]
    if recipe.uses_teacher:
        teacher = _model(recipe, dtype).eval().requires_grad_(False)
        step.attach_teacher(teacher)
    if recipe.target_teacher == "frozen":
        step.attach_frozen(_frozen(recipe))
    return step, teacher


def _frozen(recipe: Recipe) -> nn.Module:
    """The recipe's frozen teacher without its weights; what a target of one's own builds costs nothing here."""
    target = TARGETS[recipe.target]
    with unset_fake_temporarily():  # timm looks at numbers while it builds
        if target.tokenizers and (tokenizer := untrained_tokenizer(recipe, torch.bfloat16)):
            return tokenizer
        if target.family:
            return untrained_teacher(recipe, target.family).bfloat16()
    return _Given(recipe)


class _Given(nn.Module):
    """Features of every patch, [B, L, D'], or ids [B, L], from nowhere."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        ids = TARGETS[recipe.target].of_width(1).ids
        self.shape = (recipe.num_patches,) if ids else (recipe.num_patches, recipe.frozen_dim)
        self.dtype = torch.int64 if ids else torch.bfloat16

    def forward(self, images: Tensor) -> Tensor:
        return images.new_empty(len(images), *self.shape, dtype=self.dtype)


def _count(module: nn.Module | None) -> int:
    return sum(weight.numel() for weight in module.parameters()) if module else 0


def _model(recipe: Recipe, dtype: torch.dtype) -> HPMViT:
    """The recipe's model without values, weights and buffers in `dtype`."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = model_of(recipe)
    finally:
        torch.set_default_dtype(usual)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, dtype=dtype))
    return model


def loss_of(step: Step, *, maps: bool) -> Tensor:
    """The step's loss of a batch without values; `maps`: with those of a recipe that keeps some."""
    recipe = step.recipe
    images, ids, local = inputs_of(recipe, lambda shape: torch.empty(shape, dtype=torch.uint8))
    number = torch.empty((), dtype=torch.int64)
    scores = torch.empty(recipe.batch_size, recipe.num_patches) if maps else None
    return step(images, ids, number, torch.empty((), dtype=torch.float64), scores, *local).loss


def _train(step: Step) -> None:
    """Forward and backward, the gradients dropped as soon as they would have been added to the optimizer's."""
    for weight in step.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
    loss_of(step, maps=step.recipe.uses_maps).backward()
