"""Where DeepSpeed keeps the float32 master weights: the only file that knows its private layout.

With W ranks and one AdamW parameter group at a time, there are three layouts:

- whole: every rank holds every master, parameter by parameter (ZeRO 0; in float32 the weights are their own masters);
- flat: the group's parameters laid end to end, padded, and cut into W equal shards (ZeRO 1 and 2);
- striped: each parameter padded and cut into W stripes; a rank's shard is its stripes end to end (ZeRO 3).

Optimizer state (moments, EMA) has its master's shape, so whoever knows where the masters lie can gather all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fasthpm.errors import UserError

State = Literal["master", "ema", "exp_avg", "exp_avg_sq"]
CLIP_EPS = 1e-6  # DeepSpeed's, in the ratio of norm and limit


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a group."""

    name: str  # as in engine.module.named_parameters()
    shape: torch.Size
    offset: int  # first element: in the gathered group (whole, flat) or in every rank's shard (striped)
    stripe: int  # elements per rank in a striped group, 0 in the others


@dataclass(frozen=True)
class Group:
    """A master tensor of this rank, and what lies in the group that all ranks' shards make up."""

    master: Tensor  # float32 [S], or the parameter's shape in the whole layout; the client optimizer's own parameter
    dtype: torch.dtype  # of the weights in the forward pass
    slots: tuple[Slot, ...]
    shards: int  # W, or 1 where every rank holds everything
    index: int  # which shard is this rank's

    @property
    def numel(self) -> int:
        """Elements of the gathered group, padding included: W * S."""
        return self.master.numel() * self.shards

    def shard_of(self, gathered: Tensor) -> Tensor:
        """This rank's part [S] of a gathered group [W * S], as a view."""
        return gathered.view(self.shards, -1)[self.index]

    def span(self, slot: Slot) -> slice:
        """Where this rank's shard, flattened, holds elements of a parameter, without padding; perhaps nowhere."""
        if slot.stripe:
            count = min(max(slot.shape.numel() - self.index * slot.stripe, 0), slot.stripe)
            return slice(slot.offset, slot.offset + count)
        start, size = self.index * self.master.numel(), self.master.numel()
        first, last = slot.offset - start, slot.offset + slot.shape.numel() - start
        return slice(max(first, 0), min(last, size)) if last > 0 and first < size else slice(0, 0)

    def part(self, gathered: Tensor, slot: Slot) -> Tensor:
        """A parameter's elements in a gathered group, as a view: [numel], or padded [W, stripe] if striped."""
        if slot.stripe:
            return gathered.view(self.shards, -1)[:, slot.offset : slot.offset + slot.stripe]
        return gathered[slot.offset : slot.offset + slot.shape.numel()]


class MasterLayout:
    """Which piece of which named parameter this rank's float32 master tensors hold.

    Concerns trainable parameters only; buffers live in the module.

    **Raises:** `UserError` where the installed DeepSpeed keeps its masters in a way this file does not know.
    """

    def __init__(self, engine: Any) -> None:
        self.optimizer: torch.optim.Optimizer = engine.basic_optimizer
        self.process_group: dist.ProcessGroup = engine.seq_data_parallel_group
        self._engine = engine
        self._check_or_refuse(read=True)

    def _check_or_refuse(self, *, read: bool = False) -> None:
        try:
            if read:
                self.groups = self._read_groups()
            self._check()
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"deepspeed {version('deepspeed')} ({type(self._engine.optimizer).__name__}) keeps its master weights "
                f"differently from what this version of FastHPM knows ({error}); install the version in constraints.txt"
            ) from error

    @property
    def masters(self) -> list[Tensor]:
        """This rank's float32 master tensors."""
        return [group.master for group in self.groups]

    def shards(self, which: State) -> list[Tensor]:
        """This rank's masters or optimizer states, aligned with `masters`."""
        if which == "master":
            return self.masters
        return [self.optimizer.state[master][which] for master in self.masters]

    @torch.no_grad()
    def gather(self, shards: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters from every rank's shards (collective: all ranks must run it to its end).

        - `shards`: aligned with `masters`, any dtype

        **Returns:** (name, whole tensor) of every trainable parameter; may share memory with `shards`.
        """
        for group, shard in zip(self.groups, shards, strict=True):
            gathered = self.all_gather(group, shard)
            for slot in group.slots:
                yield slot.name, group.part(gathered, slot).reshape(-1)[: slot.shape.numel()].view(slot.shape)

    def all_gather(self, group: Group, shard: Tensor) -> Tensor:
        """[S] on every rank -> [W * S]. One rank alone gets its own shard back, uncopied."""
        if group.shards == 1:
            return shard.detach().reshape(-1)
        gathered = torch.empty(group.numel, dtype=shard.dtype, device=shard.device)
        self.all_gather_into(gathered, shard.detach())
        return gathered

    def all_gather_into(self, gathered: Tensor, shard: Tensor) -> None:
        """Fill `gathered` [W * S] with every rank's `shard` [S]; `shard` may be its own place in `gathered`."""
        # torch 2.13 renamed the call and warns about the old name.
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        collective(gathered, shard, group=self.process_group)

    @torch.no_grad()
    def create_optimizer_state(self) -> None:
        """Give every master fresh moments and a step count of 0, as if before the first update.

        torch creates them at the first step only, too late for a checkpoint of step 0, and DeepSpeed's ZeRO 0 counts
        an empty step of its own. A step with lr 0 and no gradient changes no weight and allocates everything.
        """
        groups = self.optimizer.param_groups
        saved = [(group["params"], group["lr"]) for group in groups]
        # ZeRO 3 takes the masters out of the optimizer between steps.
        groups[0]["params"] = self.masters
        for group in groups:
            group["lr"] = 0.0
        for group in groups[1:]:
            group["params"] = []
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
            self.optimizer.state[master]["step"].zero_()
        for group, (params, lr) in zip(groups, saved, strict=True):
            group["params"], group["lr"] = params, lr

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Make the weights of the forward pass the rounded masters, as after an update (collective).

        **Raises:** `UserError` if they then still differ.
        """
        publish = {"whole": self._publish_whole, "flat": self._publish_flat, "striped": self._publish_striped}
        publish[self._layout]()
        self._check_or_refuse()

    # ---------------------------------------------------------------------------------------------- private layouts
    @property
    def _layout(self) -> str:
        """How DeepSpeed holds the weights: whole without ZeRO, flat groups in ZeRO 1 and 2, stripes in ZeRO 3."""
        return {0: "whole", 3: "striped"}.get(self._engine.zero_optimization_stage(), "flat")

    def _publish_whole(self) -> None:
        wrapper = self._engine.optimizer
        if wrapper is self.optimizer:
            return
        for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            torch._foreach_copy_([weight.data for weight in weights], [master.detach() for master in masters])

    def _publish_flat(self) -> None:
        for group, flat in zip(self.groups, self._flat_weights(), strict=True):
            flat.data.copy_(self.all_gather(group, group.master.detach().to(flat.dtype)))

    def _publish_striped(self) -> None:
        wrapper = self._engine.optimizer
        for group, weights in zip(self.groups, wrapper.fp16_groups, strict=True):
            for slot, weight in zip(group.slots, weights, strict=True):
                weight.ds_tensor.data.copy_(group.master.detach()[slot.offset : slot.offset + slot.stripe])
        kept = wrapper.persistent_parameters  # small ones, which ZeRO 3 holds whole on every rank
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def _flat_weights(self) -> list[Tensor]:
        wrapper = self._engine.optimizer
        return getattr(wrapper, "bit16_groups_flat" if hasattr(wrapper, "bit16_groups") else "bf16_groups_flat")

    def _read_groups(self) -> list[Group]:
        self._names = {id(p): name for name, p in self._engine.module.named_parameters()}
        read = {"whole": self._whole_groups, "flat": self._flat_groups, "striped": self._striped_groups}
        return read[self._layout]()

    def _whole_groups(self) -> list[Group]:
        """FP16_UnfusedOptimizer, which also serves bfloat16; the client's optimizer itself in float32."""
        wrapper = self._engine.optimizer
        if wrapper is self.optimizer:
            weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            return [Group(w, w.dtype, (Slot(self._names[id(w)], w.shape, 0, 0),), shards=1, index=0) for w in weights]
        pairs = [
            pair
            for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for pair in zip(weights, masters, strict=True)
        ]
        return [
            Group(master, weight.dtype, (Slot(self._names[id(weight)], weight.shape, 0, 0),), shards=1, index=0)
            for weight, master in pairs
        ]

    def _flat_groups(self) -> list[Group]:
        """DeepSpeedZeroOptimizer, or BF16_Optimizer (ZeRO 1 with float32 accumulation)."""
        wrapper = self._engine.optimizer
        flats, weights = self._flat_weights(), getattr(wrapper, "bit16_groups", None) or wrapper.bf16_groups
        masters = [group["params"] for group in self.optimizer.param_groups]
        return [
            self._group(master, flat.dtype, [self._flat_slot(weight, flat) for weight in group])
            for flat, group, (master,) in zip(flats, weights, masters, strict=True)
        ]

    def _flat_slot(self, weight: Tensor, flat: Tensor) -> Slot:
        if weight.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            raise ValueError(f"{self._names[id(weight)]} is not in its flat group")
        return Slot(self._names[id(weight)], weight.shape, int(weight.storage_offset() - flat.storage_offset()), 0)

    def _striped_groups(self) -> list[Group]:
        """DeepSpeedZeroOptimizer_Stage3."""
        wrapper = self._engine.optimizer
        groups = []
        for weights, master in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
            slots, offset = [], 0
            for weight in weights:
                slots.append(Slot(self._names[id(weight)], weight.ds_shape, offset, weight.partition_numel()))
                offset += weight.partition_numel()
            groups.append(self._group(master, weights[0].dtype, slots))
        return groups

    def _group(self, master: Tensor, dtype: torch.dtype, slots: Sequence[Slot]) -> Group:
        shards, index = dist.get_world_size(self.process_group), dist.get_rank(self.process_group)
        return Group(master, dtype, tuple(slots), shards, index)

    def _check(self) -> None:
        """Compare the claimed layout with the weights themselves, which are the rounded masters between two steps."""
        weights = dict(self._engine.module.named_parameters())
        wanted = sorted(name for name, weight in weights.items() if weight.requires_grad)
        found = sorted(slot.name for group in self.groups for slot in group.slots)
        if found != wanted:
            raise ValueError(f"{len(found)} parameters found, {len(wanted)} expected")
        for group in self.groups:
            if group.master.dtype != torch.float32:
                raise TypeError(f"a master tensor is {group.master.dtype}")
            rounded = group.master.detach().reshape(-1).to(group.dtype)
            for slot in group.slots:
                if not torch.equal(*_common_elements(group, slot, rounded, weights[slot.name])):
                    raise ValueError(f"the master of {slot.name} is not where it should be")


def _common_elements(group: Group, slot: Slot, shard: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The elements of a parameter that this rank's shard claims to hold: out of the shard, and out of the parameter."""
    if slot.stripe:
        own = weight.ds_tensor.detach().reshape(-1)  # type: ignore[attr-defined]  # set by ZeRO 3
        # Behind the parameter's last element lies uninitialised padding, in which a NaN would equal nothing.
        count = min(max(slot.shape.numel() - group.index * slot.stripe, 0), slot.stripe)
        return shard[slot.offset : slot.offset + count], own[:count]
    start = group.index * len(shard)
    first, last = max(slot.offset, start), min(slot.offset + slot.shape.numel(), start + len(shard))
    if first >= last:
        return shard[:0], shard[:0]
    return shard[first - start : last - start], weight.detach().reshape(-1)[first - slot.offset : last - slot.offset]


def full_state(layout: MasterLayout, which: State) -> dict[str, Tensor] | None:
    """Masters or optimizer states as whole parameters, by name (collective).

    **Returns:** name -> float32 CPU tensor on rank 0, `None` on the other ranks.
    """
    keep = dist.get_rank() == 0
    state = {}
    for name, tensor in layout.gather(layout.shards(which)):
        if keep:
            state[name] = tensor.detach().to("cpu", copy=True)
    return state if keep else None


def update_without_waits(engine: Any) -> bool:
    """Give a ZeRO 1 or 2 engine in bfloat16 an update that never waits for the device; other engines keep theirs.

    DeepSpeed's own takes the norm of every parameter, looks at it from the host and multiplies every gradient. Here
    the norm is that of the flat gradients, and clipping and the leaving out of an update that is not finite happen
    inside fused AdamW (its `grad_scale` and `found_inf`). The numbers are DeepSpeed's, up to the order of the sums in
    the norm; `grad_norm` is infinite after an update that was left out, and `was_step_applied` does not know of it.

    **Returns:** whether `engine` has it now.
    """
    wrapper, inner = engine.optimizer, engine.basic_optimizer
    flat = _whole_gradients(wrapper) or _sharded_gradients(wrapper)
    if flat is None:
        return False
    limit = float(wrapper.clip_grad)

    @torch.no_grad()
    def step() -> None:
        norm = flat.norm()
        finite = norm.isfinite()
        inner.found_inf = (~finite).float()
        if limit:
            inner.grad_scale = ((norm + CLIP_EPS) / limit).clamp_min(1.0)
        wrapper._global_grad_norm = norm.where(finite, torch.inf)
        for master, gradient in flat.own():
            master.grad = gradient
        inner.step()
        wrapper._lazy_init_hp_params_optimizer_state()
        wrapper.update_lp_params()
        flat.clear()

    wrapper.step = step
    if getattr(wrapper, "overlap_comm", False) and wrapper.reduction_stream is not None:
        _join_reductions_without_waits(wrapper)
    return True


@dataclass(frozen=True)
class _FlatGradients:
    """Where an optimizer keeps its float32 gradients between the backward pass and the update."""

    norm: Callable[[], Tensor]  # of the whole model, float32 scalar; collective if each rank has a part
    own: Callable[[], Iterable[tuple[Tensor, Tensor]]]  # this rank's masters, and their gradients
    clear: Callable[[], None]


def _whole_gradients(wrapper: Any) -> _FlatGradients | None:
    """BF16_Optimizer's (ZeRO 1): every rank has all of them, flat, in buffers that stay."""
    parts = ("fp32_groups_actual_gradients_flat", "fp32_groups_gradient_flat_partition", "update_lp_params")
    if not all(hasattr(wrapper, part) for part in parts) or wrapper.grad_acc_dtype is not torch.float32:
        return None
    gradients = wrapper.fp32_groups_actual_gradients_flat
    own = list(zip(wrapper.fp32_groups_flat_partition, wrapper.fp32_groups_gradient_flat_partition, strict=True))
    return _FlatGradients(lambda: _norm(gradients), lambda: own, wrapper.clear_hp_grads)


def _sharded_gradients(wrapper: Any) -> _FlatGradients | None:
    """DeepSpeedZeroOptimizer's under ZeRO 2: this rank's shards, added up in new float32 buffers for every update."""
    parts = ("averaged_gradients", "single_partition_of_fp32_groups", "_use_compact_grad_partition_buffer")
    if not all(hasattr(wrapper, part) for part in parts) or not wrapper.partition_gradients or wrapper.cpu_offload:
        return None
    masters = wrapper.single_partition_of_fp32_groups
    if not all(wrapper._use_compact_grad_partition_buffer(number) for number in range(len(masters))):
        return None
    ranks = dist.get_world_size(wrapper.dp_process_group)

    def gradients() -> list[Tensor]:
        return [wrapper.averaged_gradients[number].flat_partition for number in range(len(masters))]

    def norm() -> Tensor:
        own = _norm(gradients())
        if ranks == 1:
            return own
        squares = own.square()
        dist.all_reduce(squares, group=wrapper.dp_process_group)
        return squares.sqrt()

    def clear() -> None:
        wrapper.micro_step_id = -1
        for number, master in enumerate(masters):
            master.grad = wrapper.averaged_gradients[number] = wrapper.all_grad_tensors[number] = None

    return _FlatGradients(norm, lambda: zip(masters, gradients(), strict=True), clear)


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def _join_reductions_without_waits(wrapper: Any) -> None:
    """After the backward pass, have the device's stream and not the host wait for ZeRO 2's overlapped reductions."""
    own = wrapper.independent_gradient_partition_epilogue

    def epilogue() -> None:
        wrapper.reduce_ipg_grads()  # the last buckets, on the stream of their own
        torch.cuda.current_stream().wait_stream(wrapper.reduction_stream)
        wrapper._clear_previous_reduced_grads()
        wrapper.overlap_comm = False  # else the host would wait here; nothing is left to reduce
        try:
            own()
        finally:
            wrapper.overlap_comm = True

    wrapper.independent_gradient_partition_epilogue = epilogue


def prepare_deepspeed(timeout: timedelta) -> None:
    """What must be set before DeepSpeed joins the ranks: settings for which it has no option.

    - It would compile a shared-memory all-reduce that only its inference uses, needs a compiler, takes half a minute,
      and leaves buffers in /dev/shm behind when a rank is killed.
    - It would give its own process group torch's default timeout instead of ours.
    """
    import deepspeed
    from deepspeed.utils import groups

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups._WORLD_GROUP = dist.new_group(timeout=timeout)


def add_gradients_at_once(engine: Any) -> None:
    """Have a ZeRO 1 engine in bfloat16 take all gradients into float32 at the end of the backward pass, by a kernel or
    two, where DeepSpeed does it one by one with two kernels each. The same bits; all of them exist until then."""
    wrapper, alone = engine.optimizer, engine.gradient_accumulation_steps() == 1
    if _whole_gradients(wrapper) is None:
        return
    pairs = [
        (weight, total.view(weight.shape))
        for weights, totals in zip(wrapper.bf16_groups, wrapper.fp32_groups_gradients, strict=True)
        for weight, total in zip(weights, totals, strict=True)
    ]

    @torch.no_grad()
    def add(clear_lp_grads: bool = False) -> None:
        there = [(total, weight.grad) for weight, total in pairs if weight.grad is not None]
        totals, new = [total for total, _ in there], [gradient for _, gradient in there]
        if alone:  # the totals are zeros
            torch._foreach_copy_(totals, new)
        else:
            exact = [torch.empty_like(total) for total in totals]
            torch._foreach_copy_(exact, new)
            torch._foreach_add_(totals, exact)
        for weight, _ in pairs:
            weight.grad = None

    for hook in wrapper._grad_acc_hooks:
        hook.remove()
    wrapper.immediate_grad_update, wrapper.update_hp_grads = False, add


@contextmanager
def own_parameters(module: torch.nn.Module) -> Iterator[None]:
    """Let `module` be used otherwise than by its forward: its own parameters, not those of its parts, are whole.

    Collective. Under ZeRO 3 a forward gathers what belongs to the module that is called, and to no other.
    """
    split = [weight for weight in module.parameters(recurse=False) if hasattr(weight, "ds_id")]
    if not split:
        yield
        return
    import deepspeed  # late: it takes seconds

    with deepspeed.zero.GatheredParameters(split):
        yield
