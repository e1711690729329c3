"""Starting ranks, agreeing on errors, and building the DeepSpeed engine from a recipe and a DeepSpeed JSON.

The recipe owns what is learnt (batch, accumulation, clipping, learning rate); the JSON owns how it runs (ZeRO stage,
dtypes, buckets) and says "auto" for the rest. A contradiction is an error that names both.
"""

import copy
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasthpm.errors import AgreedError, UserError, nearest
from fasthpm.recipe import Recipe
from fasthpm.zero import MasterLayout, prepare_deepspeed

TIMEOUT = "FASTHPM_TIMEOUT_MINUTES"
DEFAULT_TIMEOUT_MINUTES = 5.0

# What launchers call rank, rank on this machine, number of ranks, number on this machine (its alternatives).
LAUNCHERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),  # torchrun, deepspeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", ("MPI_LOCALNRANKS",)),  # MPICH, Intel MPI
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", ("SLURM_STEP_TASKS_PER_NODE",)),  # srun
)


# ------------------------------------------------------------------------------------------------------ ranks
@dataclass(frozen=True)
class Launch:
    """This process's place among the ranks."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device


@contextmanager
def session() -> Iterator[Launch]:
    """A rank's life: joins the others, and leaves them at the end or after an error that all of them agreed on.

    After any other error the process must die at once, so that its launcher stops the ranks that wait for it.
    """
    launch = start()
    try:
        yield launch
    except AgreedError:
        finish()
        raise
    finish()


def start() -> Launch:
    """Join the process group that the environment describes, or a group of one.

    gloo on CPUs, NCCL on GPUs; a rank that waits longer than `FASTHPM_TIMEOUT_MINUTES` for another gives up.

    **Raises:** `UserError` for an environment that makes no sense.
    """
    limit = timeout()
    rank, local_rank, world_size, local_world_size = _place(os.environ)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    _quieten(rank)
    device = _device(deepspeed.get_accelerator().device_name(), local_rank, local_world_size)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    else:
        bound = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=limit, **bound)  # type: ignore[arg-type]
    prepare_deepspeed(limit)
    deepspeed.init_distributed(backend, verbose=False, timeout=limit)
    return Launch(rank, local_rank, world_size, local_world_size, device)


def finish() -> None:
    """Leave the process group; safe to call twice. All ranks must call it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _place(env: Any) -> tuple[int, int, int, int]:
    """(rank, local rank, world size, local world size), written back under the names that DeepSpeed reads."""
    place = (0, 0, 1, 1)
    for rank, local_rank, size, local_sizes in LAUNCHERS:
        if rank in env and local_rank in env and size in env:
            local_size = next((name for name in local_sizes if name in env), size)
            place = tuple(_number(env, name) for name in (rank, local_rank, size, local_size))  # type: ignore[assignment]
            break
    if not (0 <= place[0] < place[2] and 0 <= place[1] < place[3] <= place[2]):
        raise UserError(
            f"rank {place[0]} of {place[2]} (local rank {place[1]} of {place[3]}) is impossible; check the launcher's "
            f"environment variables"
        )
    if place[2] > place[3] and "MASTER_ADDR" not in env:
        raise UserError(
            f"{place[2]} ranks, {place[3]} of them here, and no MASTER_ADDR; set it to the first machine's address"
        )
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", "29500")
    env.update(zip(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), map(str, place), strict=True))
    return place


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    digits = text.partition("(")[0]  # SLURM writes "2(x3)" for two tasks on each of three machines
    if not digits.isdecimal():
        raise UserError(f"environment variable {name} is {text!r}, expected a number; check the launcher")
    return int(digits)


def timeout(env: Mapping[str, str] = os.environ) -> timedelta:
    """How long a rank waits for another before it gives up: `FASTHPM_TIMEOUT_MINUTES`.

    **Raises:** `UserError` if that is no time.
    """
    text = env.get(TIMEOUT, str(DEFAULT_TIMEOUT_MINUTES))
    try:
        minutes = float(text)
        if not 0 < minutes < 1e6:
            raise ValueError
    except ValueError:
        raise UserError(f"{TIMEOUT} is {text!r}, expected minutes, more than 0") from None
    return timedelta(minutes=minutes)


def threads(local_world_size: int, cores: int, env: Mapping[str, str] = os.environ) -> int:
    """Threads of a rank on the CPU: its share of the cores, or what OMP_NUM_THREADS says to a process alone.

    Beside other ranks that variable is the launcher's (torchrun writes 1 into it), not the user's.
    """
    wanted = env.get("OMP_NUM_THREADS", "")
    if local_world_size == 1 and wanted.isdecimal() and int(wanted):
        return int(wanted)
    return max(1, cores // local_world_size)


def _device(accelerator: str, local_rank: int, local_world_size: int) -> torch.device:
    """This rank's GPU; or the CPU, whose cores the ranks of this machine share."""
    if accelerator == "cpu":
        torch.set_num_threads(threads(local_world_size, len(os.sched_getaffinity(0))))
        return torch.device("cpu")
    if accelerator != "cuda":
        raise UserError(
            f"DeepSpeed chose the accelerator {accelerator!r}, expected cuda or cpu; set DS_ACCELERATOR=cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU, {torch.cuda.device_count()} are visible here; start fewer ranks"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _quieten(rank: int) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR if rank else logging.WARNING)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed 0.19 calls them by their old names
        message = rf"`torch\.distributed\.{name}` is deprecated"
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # A single GPU is not bound to its group: there is no one to reach.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")


# ------------------------------------------------------------------------------------------------------ errors
def agree(error: UserError | None) -> None:
    """Raise the first rank's error on every rank, or return on all of them (collective).

    **Raises:** `AgreedError` with the text of the lowest rank that has an error, and that rank's number unless it is 0.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if error is None else str(error))
    for rank, text in enumerate(texts):
        if text is not None:
            message = f"rank {rank}: {text}" if rank else text
            raise AgreedError(message, printed_elsewhere=dist.get_rank() != 0)


@contextmanager
def in_agreement() -> Iterator[None]:
    """Run a block in which any rank may find wrong input; at its end all ranks go on, or all raise (collective).

    The block itself must hold no collective call: a rank that fails would leave the others waiting in it.
    """
    error = None
    try:
        yield
    except UserError as found:
        error = found
    agree(error)


@contextmanager
def naming_lost_ranks(where: Callable[[], str]) -> Iterator[None]:
    """Say in one line, before the traceback, that a collective failed because another rank or the network is gone.

    - `where`: how far this rank had come
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            print(
                f"fasthpm: error: rank {dist.get_rank()} lost another rank {where()} ({_first_line(error)}); see what "
                f"its machine says, and start the same command to resume from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        raise


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rpartition("] ")[2].rstrip(". ")


# ------------------------------------------------------------------------------------------------------ configuration
RECIPE_OWNS = {
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accum_iter",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "clip_grad",
}
# Every key that is known to work with the EMA teacher and with our own metrics and checkpoints.
JSON_OWNS: dict[str, tuple[str, ...] | None] = {  # None: anything inside
    "zero_optimization": (
        "stage",
        "reduce_bucket_size",
        "allgather_bucket_size",
        "allgather_partitions",
        "reduce_scatter",
        "overlap_comm",
        "contiguous_gradients",
        "round_robin_gradients",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
    ),
    "bf16": ("enabled", "immediate_grad_update", "check_grad_overflow"),
    "data_types": ("grad_accum_dtype", "buffer_dtype"),
    "communication_data_type": None,
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "activation_checkpointing": None,
    "flops_profiler": None,
    "comms_logger": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "steps_per_print": None,
}
REFUSED = {
    "optimizer": "the recipe owns the optimizer (lr, betas, weight_decay); remove the block",
    "scheduler": "the recipe owns the schedule (warmup_epochs, min_lr, epochs); remove the block",
    "fp16": 'use bf16 instead: {"enabled": true}',
    "amp": 'use bf16 instead: {"enabled": true}',
    "torch_autocast": 'use bf16 instead: {"enabled": true}',
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "FastHPM writes the metrics; remove the block"),
    "checkpoint": "FastHPM writes the checkpoints; remove the block",
}
OFFLOAD = "offload is not supported with the EMA teacher yet; remove it, or use stage 3 on more devices"


def merge_config(path: str | Path, recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON at `path`, with what the recipe owns filled in.

    - `recipe`: resolved for `world_size`

    **Raises:** `UserError` for a file that cannot be read, keys that are unknown or refused, and contradictions.
    """
    if recipe.global_batch_size != recipe.batch_size * recipe.accum_iter * world_size or not recipe.accum_iter:
        raise ValueError(f"the recipe is not resolved for {world_size} ranks")
    config = _read_json(Path(path))
    _check_keys(config, str(path))
    _check_stage(config, str(path))
    for key, owner in RECIPE_OWNS.items():
        value, wanted = config.get(key, "auto"), getattr(recipe, owner)
        if value != "auto" and (isinstance(value, bool) or value != wanted):
            raise UserError(
                f"{path}: {key} is {value!r}, but the recipe's {owner} is {wanted!r}; the recipe owns it: write "
                f'"auto" there, or change --{owner}'
            )
        config[key] = wanted
    if _uses_bf16(config):
        config.setdefault("data_types", {}).setdefault("buffer_dtype", "bf16")
        if recipe.on_nonfinite == "skip":
            _check_gradients(config["bf16"], str(path))
    elif recipe.on_nonfinite == "skip" and not _stage(config):
        raise UserError(
            f"{path}: ZeRO stage 0 in float32 does not look at gradients before it uses them, but the recipe's "
            f"on_nonfinite is 'skip'; use stage 1, or --on_nonfinite rollback"
        )
    return config


def _check_gradients(bf16: dict[str, Any], path: str) -> None:
    """Have ZeRO 1 and 2 look at the gradients before they use them, as the other stages always do in bf16."""
    if bf16.get("check_grad_overflow", True) is not True:
        raise UserError(
            f"{path}: bf16.check_grad_overflow is {bf16['check_grad_overflow']!r}, but the recipe's on_nonfinite is "
            f"'skip', which needs it; remove it there, or use --on_nonfinite rollback"
        )
    bf16["check_grad_overflow"] = True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"DeepSpeed config {path} cannot be read ({reason}); ds_configs/ has working ones") from error
    if not isinstance(config, dict):
        raise UserError(f"DeepSpeed config {path} holds a {type(config).__name__}, expected an object {{...}}")
    return config


def _check_keys(config: dict[str, Any], path: str) -> None:
    known = [*RECIPE_OWNS, *JSON_OWNS]
    for key, value in config.items():
        if key in REFUSED:
            raise UserError(f"{path}: {key!r} is not allowed: {REFUSED[key]}")
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, known)}")
        inner = JSON_OWNS.get(key)
        if inner is not None:
            _check_block(key, value, inner, path)


def _check_block(block: str, value: Any, known: tuple[str, ...], path: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {block} is {value!r}, expected an object {{...}}")
    for key in value:
        if "offload" in key:
            raise UserError(f"{path}: {block}.{key}: {OFFLOAD}")
        if key not in known:
            raise UserError(f"{path}: unknown or unsupported key {block}.{key}{nearest(key, known)}")


def _check_stage(config: dict[str, Any], path: str) -> None:
    stage = _stage(config)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    accumulation = config.get("data_types", {}).get("grad_accum_dtype")
    own = "bf16" if _uses_bf16(config) else "fp32"
    if stage == 0 and accumulation not in (None, own):
        raise UserError(
            f"{path}: data_types.grad_accum_dtype is {accumulation!r}, but ZeRO stage 0 accumulates in {own} here; "
            f"remove it, or use stage 1"
        )


def _stage(config: dict[str, Any]) -> Any:
    return config.get("zero_optimization", {}).get("stage", 0)


def _uses_bf16(config: dict[str, Any]) -> bool:
    return bool(config.get("bf16", {}).get("enabled", False))


# ------------------------------------------------------------------------------------------------------ engine
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups, in the order of the parameters' names; frozen parameters are left out.

    No weight decay on biases, norms (every 1-D tensor) and tokens.
    """
    groups: dict[str, list[nn.Parameter]] = {"no_decay": [], "decay": []}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or name.rpartition(".")[2] in ("bias", "cls_token", "mask_token")
            groups["no_decay" if exempt else "decay"].append(parameter)
    return [
        {"name": name, "params": params, "weight_decay": weight_decay if name == "decay" else 0.0}
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
    optimizer = torch.optim.AdamW(
        groups or parameter_groups(step_module, recipe.weight_decay),
        lr=0.0,  # ZeRO 0 takes an empty step while it starts, which must not decay the weights
        betas=(recipe.beta1, recipe.beta2),
        eps=1e-8,
        fused=True,
    )
    with hush():
        engine, *_ = deepspeed.initialize(
            model=step_module, optimizer=optimizer, config=copy.deepcopy(config), dist_init_required=False
        )
    MasterLayout(engine).create_optimizer_state()
    if engine.optimizer is optimizer:
        _clip_by_ourselves(engine, recipe.clip_grad)
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
    """Swallow what DeepSpeed prints: while it starts or loads a checkpoint, some of its optimizers do."""
    with redirect_stdout(io.StringIO()):
        yield


def set_lr(engine: Any, lr: float) -> None:
    """Learning rate of every parameter group, times its `lr_scale` if it has one, from the next update on."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def grad_norm(engine: Any) -> Tensor | float:
    """Global gradient norm of the last update, before clipping; infinite if the update was skipped."""
    norm = engine.get_global_grad_norm()
    return 0.0 if norm is None else norm


def update_applied(engine: Any) -> bool:
    """Whether the last update changed the weights: DeepSpeed leaves out those whose gradient is not finite.

    The same on all ranks. Stages 1 and 2 in bf16 look at the gradient only if bf16.check_grad_overflow is set.
    """
    return bool(engine.was_step_applied())
