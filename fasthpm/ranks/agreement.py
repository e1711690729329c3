"""Ranks that agree: an error on one of them ends all of them, with one line."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from fasthpm.errors import AgreedError, UserError

Made = TypeVar("Made")
PATIENCE = timedelta(days=1)  # for rank 0 alone at work; if it dies, its connections end the wait


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


def by_first(make: Callable[[], Made]) -> Made:
    """What rank 0 makes, on every rank; the others wait for it, however long it takes (collective).

    **Raises:** rank 0's `UserError`, on every rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
    told: list[Any] = [None, None]  # what was made, or the error
    if dist.get_rank() == 0:
        try:
            told[0] = make()
        except UserError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, group=group)
    if told[1] is not None:
        raise AgreedError(told[1], printed_elsewhere=dist.get_rank() != 0)
    return told[0]


def share(sums: Tensor, world_size: int) -> Tensor:
    """Sums over ranks, in place (collective)."""
    if world_size > 1:
        dist.all_reduce(sums)
    return sums


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
