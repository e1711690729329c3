"""Starting ranks, agreeing on errors, and building the DeepSpeed engine from a recipe and a DeepSpeed JSON.

The recipe owns what is learnt (batch, accumulation, clipping, learning rate); the JSON owns how it runs (ZeRO stage,
dtypes, buckets) and says "auto" for the rest. A contradiction is an error that names both.
"""

import copy
import gc
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from fasthpm.ranks.clipping import clip_each
from fasthpm.ranks.launch import Launch
from fasthpm.ranks.zero import MasterLayout, add_gradients_at_once, update_without_waits
from fasthpm.recipe import Recipe

LAST_LAYER = "last_layer"  # of a projection head: what `freeze_last_layer` holds still


# ------------------------------------------------------------------------------------------------------ engine
def parameter_groups(model: nn.Module, weight_decay: float, apart: str = "") -> list[dict[str, Any]]:
    """AdamW's parameter groups, in the order of the parameters' names; frozen parameters are left out.

    No weight decay on biases, norms (every 1-D tensor) and tokens. Parameters whose names contain `apart`, if it is
    given, make a group of their own of that name.
    """
    names = ("no_decay", "decay", *([apart] if apart else []))
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or name.rpartition(".")[2] in ("bias", "cls_token", "mask_token", "pos_embed")
            kind = "no_decay" if exempt else "decay"
            groups[apart if apart and apart in name else kind].append(parameter)
    return [
        {"name": name, "params": params, "weight_decay": 0.0 if name == "no_decay" else weight_decay}
        for name, params in groups.items()
        if params
    ]


def build_engine(
    step_module: nn.Module,
    recipe: Recipe,
    config: dict[str, Any],
    launch: Launch,
    groups: list[dict[str, Any]] | None = None,
) -> Any:
    """Wrap `step_module` in DeepSpeed with AdamW (fused), its state allocated and its step count at 0.

    - `config`: from `merge_config`
    - `groups`: AdamW's parameter groups; None = `parameter_groups`. A group's `lr_scale` multiplies its learning rate

    **Returns:** a `deepspeed.DeepSpeedEngine`.
    """
    import deepspeed

    step_module.to(launch.device)
    if groups is None:
        apart = LAST_LAYER if recipe.freeze_last_layer_epochs else ""
        groups = parameter_groups(step_module, recipe.weight_decay, apart)
        groups = [{**group, "decay_moves": recipe.weight_decay_end >= 0} for group in groups]
    optimizer = torch.optim.AdamW(
        groups,
        lr=0.0,  # ZeRO 0 takes an empty step while it starts, which must not decay the weights
        betas=(recipe.beta1, recipe.beta2),
        eps=1e-8,
        fused=True,
    )
    with hush(), uncollected():
        engine, *_ = deepspeed.initialize(
            model=step_module, optimizer=optimizer, config=copy.deepcopy(config), dist_init_required=False
        )
    MasterLayout(engine).create_optimizer_state()
    if engine.optimizer is optimizer:
        _clip_by_ourselves(engine, 0.0 if recipe.clip_per_tensor else recipe.clip_grad)
    if recipe.clip_per_tensor:
        clip_each(engine, recipe.clip_grad)
    on_device = launch.device.type == "cuda" and recipe.on_nonfinite != "skip"  # which must know of each update at once
    if on_device and update_without_waits(engine):
        keep_rates_on(engine, launch.device)
        add_gradients_at_once(engine)
    if launch.world_size == 1:
        _do_not_reduce(engine)
    set_lr(engine, recipe.lr)
    return engine


def _clip_by_ourselves(engine: Any, limit: float) -> None:
    """Clip the gradients of ZeRO 0 in float32 as the other stages do, and keep their norm, which DeepSpeed forgets."""

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if limit and (norm.device.type != "cpu" or norm > limit):  # a GPU would have to be waited for
            nn.utils.clip_grads_with_norm_(weights, limit, norm)
        optimizer._global_grad_norm = norm  # type: ignore[attr-defined]  # where the engine looks for it

    engine.optimizer.register_step_pre_hook(clip)
    engine.clip_fp32_gradients = lambda: None


def _do_not_reduce(engine: Any) -> None:
    """One rank alone has nothing to reduce, but DeepSpeed would copy all gradients into a bucket and back.

    Only ZeRO 2, 3 and the float32 form of ZeRO 1 gather the gradients for their optimizer on that way.
    """
    if engine.zero_optimization_stage() < 2 and not hasattr(engine.optimizer, "reduce_gradients"):
        engine.enable_backward_allreduce = False


@contextmanager
def hush() -> Iterator[None]:
    """Swallow what DeepSpeed prints while it starts."""
    with redirect_stdout(io.StringIO()):
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave what exists out of garbage collections: DeepSpeed asks for six while it starts, which take two seconds."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def set_lr(engine: Any, lr: float) -> None:
    """Learning rate of every parameter group, times its `lr_scale` if it has one, from the next update on."""
    for group in engine.basic_optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def set_weight_decay(engine: Any, weight_decay: float) -> None:
    """Weight decay of every parameter group that has any, from the next update on."""
    for group in engine.basic_optimizer.param_groups:
        if group["name"] != "no_decay":
            group["weight_decay"] = weight_decay


def decay_moves(engine: Any) -> bool:
    """Whether the weight decay changes from update to update; AdamW takes it from the host."""
    return any(group.get("decay_moves", False) for group in engine.basic_optimizer.param_groups)


def freeze_last_layer(engine: Any, frozen: bool) -> None:
    """Whether the last layer of a projection head stays as it is, from the next `set_lr` on: its learning rate is 0,
    and so is its decay. Its moments follow its gradients, as they would not in DINO's code."""
    for group in engine.basic_optimizer.param_groups:
        if group["name"] == LAST_LAYER:
            group["lr_scale"] = 0.0 if frozen else 1.0


def keep_rates_on(engine: Any, device: torch.device) -> None:
    """Have AdamW read its learning rates from `device`, in float32: an update then needs no number of the host's, and
    may be recorded as a graph."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = torch.full((), group["lr"], dtype=torch.float32, device=device)


def grad_norm(engine: Any) -> Tensor | float:
    """Global gradient norm of the last update, before clipping; infinite if the update was skipped."""
    norm = engine.get_global_grad_norm()
    return 0.0 if norm is None else norm


def update_applied(engine: Any) -> bool:
    """Whether the last update changed the weights: DeepSpeed leaves out those whose gradient is not finite.

    The same on all ranks. Stages 1 and 2 in bf16 look at the gradient only if bf16.check_grad_overflow is set.
    """
    return bool(engine.was_step_applied())


# ------------------------------------------------------------------------------------------------------ recorded steps
COUNTED = (
    "micro_steps",
    "global_steps",
    "global_samples",
    "_step_applied",
    "_running_engine_step",
    "_global_grad_norm",
)


def updates_on_device(engine: Any) -> bool:
    """Whether an update asks the host for nothing; see `keep_rates_on`."""
    return all(isinstance(group["lr"], Tensor) for group in engine.basic_optimizer.param_groups)


def ends_update(engine: Any) -> bool:
    """Whether the micro-step that is due is the last of its update."""
    return bool(engine.is_gradient_accumulation_boundary())


def count_micro_step(engine: Any, norm: Tensor | None) -> None:
    """Count a micro-step that the device has done without DeepSpeed; `norm`: of the gradient, if it ended an update."""
    engine.micro_steps += 1
    if norm is not None:
        engine.global_steps += 1
        engine.global_samples += engine.train_batch_size()
        engine._step_applied, engine._global_grad_norm = True, norm


@contextmanager
def only_recorded(engine: Any) -> Iterator[None]:
    """Leave no trace in DeepSpeed of a micro-step that is recorded inside, and not done: no count, no gradient, and no
    reduction of the ranks' gradients either."""
    kept, reduces = {name: getattr(engine, name) for name in COUNTED}, engine.enable_backward_allreduce
    engine.enable_backward_allreduce = False
    groups = engine.basic_optimizer.param_groups
    for group in groups:
        group["capturable"] = True  # AdamW's word that it will be recorded
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
        vars(engine).update(kept)
        engine.enable_backward_allreduce = reduces
        engine.optimizer.exit_backward()  # where an error has ended it
        for weight in engine.module.parameters():
            weight.grad = None
