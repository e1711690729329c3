"""The EMA teacher: a float32 average of the optimizer's master weights, and a copy of it that can run forward."""

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fasthpm.ranks.zero import Group, MasterLayout, Slot

Module = TypeVar("Module", bound=nn.Module)
EMA = "ema"


class EMATeacher(Generic[Module]):
    """theta_teacher <- m * theta_teacher + (1 - m) * theta_student after every optimizer step (Eq. 1).

    The average is kept in float32, sharded like the optimizer's state and stored in it, so that checkpoints carry it;
    call `refresh` after loading one. It starts as a copy of the student's master weights.

    - `engine`: the DeepSpeed engine, before its first step
    - `student`: a module inside `engine.module`, all of it trainable
    - `prefix`: what its parameters' names begin with there, as in "student."
    - `module`: another module of the same class; becomes the teacher's copy
    - `momentum`: m; set it anew before any step
    - `followed`: what the names of parameters begin with, inside `student`, that the teacher has as the student has
      them, and not their average: those that learn from the teacher's own features

    `module` must not be registered inside `engine.module`, where DeepSpeed would shard and train it.
    """

    def __init__(
        self, engine: Any, student: nn.Module, prefix: str, module: Module, momentum: float, followed: str = ""
    ) -> None:
        self._weight = torch.zeros((), device=engine.device)  # 1 - m in float32, where an update needs no host
        self.momentum = momentum
        self.module: Module = module.to(engine.device).eval().requires_grad_(False)
        self.layout = MasterLayout(engine)
        self._student = student
        for master in self.layout.masters:
            self._state(master)[EMA] = master.detach().clone()
        weights = {prefix + name: weight for name, weight in self.module.named_parameters()}
        missing = set(weights) - {slot.name for group in self.layout.groups for slot in group.slots}
        if missing:
            raise ValueError(f"the student has no trainable {min(missing)}; teacher and student must be alike")
        self._copies = {
            id(group.master): _Copy(group, weights, self._state(group.master)[EMA]) for group in self.layout.groups
        }
        self._followed = {
            id(group.master): [span for slot in group.slots if (span := _span(group, slot, prefix + followed))]
            for group in self.layout.groups
            if followed
        }
        self.layout.optimizer.register_step_post_hook(self._after_step)
        self.refresh()

    @property
    def momentum(self) -> float:
        """m of the next steps."""
        return self._momentum

    @momentum.setter
    def momentum(self, momentum: float) -> None:
        self._momentum = momentum
        self._weight.fill_(1 - momentum)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make `module` the average, rounded to the forward dtype (collective); buffers come from the student.

        All stays where it is in memory, once it has the forward dtype: a recorded step reads it there.
        """
        buffers = dict(self._student.named_buffers())
        for name, buffer in self.module.named_buffers():
            if buffer.dtype == buffers[name].dtype:
                buffer.copy_(buffers[name])
            else:
                buffer.data = buffers[name].detach().clone()
        self._publish(self.layout.masters)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # DeepSpeed steps one parameter group at a time: these are the masters that have just moved.
        masters = [master for group in optimizer.param_groups for master in group["params"]]
        if masters:
            averages = [self._state(master)[EMA] for master in masters]
            left_out = getattr(optimizer, "found_inf", None)  # 1 on the device if the update was not finite
            if left_out is None:
                torch._foreach_lerp_(averages, [master.detach() for master in masters], 1 - self.momentum)
            else:
                weight = self._weight * (1 - left_out)
                for average, master in zip(averages, masters, strict=True):
                    average.lerp_(master.detach(), weight)
            self._follow(masters)
            self._publish(masters)

    def _follow(self, masters: list[Tensor]) -> None:
        """Put the followed parameters' masters in the place of their averages."""
        for master in masters:
            average = self._state(master)[EMA].view(-1)
            for span in self._followed.get(id(master), []):
                average[span] = master.detach().view(-1)[span]

    def _publish(self, masters: list[Tensor]) -> None:
        masters = [master for master in masters if not self._copies[id(master)].is_average]
        copies = [self._copies[id(master)] for master in masters]
        if not copies:
            return
        gathered = [copy.buffer() for copy in copies]
        shards = [copy.group.shard_of(full) for copy, full in zip(copies, gathered, strict=True)]
        torch._foreach_copy_(shards, [self._state(master)[EMA].view(-1) for master in masters])
        for copy, full, shard in zip(copies, gathered, shards, strict=True):
            if copy.group.shards > 1:
                self.layout.all_gather_into(full, shard)
            copy.fill_weights(full)

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        return self.layout.optimizer.state[master]


def _span(group: Group, slot: Slot, prefix: str) -> slice | None:
    """Where this rank's shard holds the parameter `slot`, if its name begins with `prefix`."""
    if not slot.name.startswith(prefix):
        return None
    if slot.stripe:
        return slice(slot.offset, slot.offset + slot.stripe)
    start, size = group.index * group.master.numel(), group.master.numel()
    first, last = slot.offset - start, slot.offset + slot.shape.numel() - start
    return slice(max(first, 0), min(last, size)) if last > 0 and first < size else None


class _Copy:
    """The teacher's share of one group: its weights are views of one gathered buffer, unless the group is striped.

    That buffer is the average itself where this rank holds all of it in the forward dtype.
    """

    def __init__(self, group: Group, weights: dict[str, nn.Parameter], average: Tensor) -> None:
        self.group = group
        self._stripes: list[tuple[Slot, Tensor]] = []
        self._full: Tensor | None = None
        self.is_average = group.shards == 1 and group.dtype == average.dtype and not group.slots[0].stripe
        if not group.slots[0].stripe:
            self._full = average.view(-1) if self.is_average else self._empty(group.numel)
        for slot in group.slots:
            weight = weights.get(slot.name)
            if weight is not None:
                storage = self._storage(slot)
                weight.data = storage.reshape(-1)[: slot.shape.numel()].view(slot.shape)

    def buffer(self) -> Tensor:
        """[W * S] in the forward dtype, to be filled."""
        return self._empty(self.group.numel) if self._full is None else self._full

    def fill_weights(self, full: Tensor) -> None:
        """Put a filled buffer's contents into the weights: nothing to do where they are views of it."""
        if self._stripes:
            slots, storages = zip(*self._stripes, strict=True)
            torch._foreach_copy_(list(storages), [self.group.part(full, slot) for slot in slots])

    def _storage(self, slot: Slot) -> Tensor:
        if self._full is not None:
            return self.group.part(self._full, slot)
        storage = self._empty(self.group.shards * slot.stripe).view(self.group.shards, slot.stripe)
        self._stripes.append((slot, storage))
        return storage

    def _empty(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self.group.dtype, device=self.group.master.device)
