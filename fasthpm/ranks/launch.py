"""The place of this process among the ranks, its device and threads, and the session around a command."""

import functools
import itertools
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fasthpm.errors import AgreedError, UserError
from fasthpm.machine import count_cores
from fasthpm.ranks.zero import prepare_deepspeed

TIMEOUT = "FASTHPM_TIMEOUT_MINUTES"
DEFAULT_TIMEOUT_MINUTES = 5.0

# What launchers call rank, rank on this machine, number of ranks, number on this machine (its alternatives).
LAUNCHERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),  # torchrun, deepspeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", ("MPI_LOCALNRANKS",)),  # MPICH, Intel MPI
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", ("SLURM_STEP_TASKS_PER_NODE",)),  # srun
)
_sessions = itertools.count()  # of this process, the same on all ranks: addresses of an earlier one lead nowhere
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as DeepSpeed reads it


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

    After any other error the process must die at once, so that its launcher stops the ranks that wait for it. A rank
    alone always leaves; the caller may go on and start another session.
    """
    with _restored_environment():
        launch = start()
        try:
            yield launch
        except BaseException as error:
            if launch.world_size == 1 or isinstance(error, AgreedError):
                finish()
            raise
        finish()


@contextmanager
def _restored_environment() -> Iterator[None]:
    """Take back what `_place` writes: other programs would believe that a launcher had started them."""
    before = {name: os.environ.get(name) for name in PLACE}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def start() -> Launch:
    """Join the process group that the environment describes, or a group of one.

    gloo on CPUs, NCCL on GPUs; a rank that waits longer than `FASTHPM_TIMEOUT_MINUTES` for another gives up.

    **Raises:** `UserError` for an environment that makes no sense, or that DeepSpeed is not installed in.
    """
    limit = timeout()
    if dist.is_initialized():
        raise UserError("torch.distributed is in use in this process; call torch.distributed.destroy_process_group()")
    rank, local_rank, world_size, local_world_size = _place(os.environ)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _deepspeed()
    _quieten(rank)
    device = _device(deepspeed.get_accelerator().device_name(), local_rank, local_world_size)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    else:
        bound = {"device_id": device} if device.type == "cuda" else {}
        store = dist.PrefixStore(f"session {next(_sessions)}", _meeting_place(rank, world_size))
        store.set_timeout(limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit, **bound)  # type: ignore[arg-type]
    prepare_deepspeed(limit)
    deepspeed.init_distributed(backend, verbose=False, timeout=limit)
    return Launch(rank, local_rank, world_size, local_world_size, device)


@functools.cache
def _meeting_place(rank: int, world_size: int) -> dist.Store:
    """Where the ranks find each other; kept, as further sessions cannot open the launcher's port again."""
    return next(dist.rendezvous("env://", rank, world_size, timeout=timeout()))[0]


def finish() -> None:
    """Leave the process group; safe to call twice. All ranks must call it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _deepspeed() -> Any:
    try:
        import deepspeed
    except Exception as error:  # a broken installation can raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"training and probing need DeepSpeed, which does not import ({reason}); install it: pip install "
            f"'fasthpm[train]'"
        ) from error
    return deepspeed


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
    env.update(zip(PLACE[:4], map(str, place), strict=True))
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
    return minutes(TIMEOUT, DEFAULT_TIMEOUT_MINUTES, env)


def minutes(name: str, default: float, env: Mapping[str, str] = os.environ) -> timedelta:
    """A time, more than none, that the environment variable `name` gives in minutes.

    **Raises:** `UserError` if that is no time.
    """
    text = env.get(name, str(default))
    try:
        found = float(text)
        if not 0 < found < 1e6:
            raise ValueError
    except ValueError:
        raise UserError(f"{name} is {text!r}, expected minutes, more than 0") from None
    return timedelta(minutes=found)


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
        torch.set_num_threads(threads(local_world_size, count_cores()))
        return torch.device("cpu")
    if accelerator != "cuda":
        raise UserError(
            f"DeepSpeed chose the accelerator {accelerator!r}, expected cuda or cpu; set DS_ACCELERATOR=cpu"
        )
    visible = torch.cuda.device_count()
    if visible == 1 and len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
        local_rank = 0  # the launcher shows every task its own GPU alone (SLURM --gpus-per-task)
    if local_rank >= visible:
        raise UserError(f"local rank {local_rank} has no GPU, {visible} are visible here; start fewer ranks")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _quieten(rank: int) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR if rank else logging.WARNING)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed 0.19 calls them by their old names
        message = rf"`torch\.distributed\.{name}` is deprecated"
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # A single GPU is not bound to its group: there is no one to reach.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
