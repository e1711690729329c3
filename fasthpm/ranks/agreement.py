"""Ranks that agree: an error on one of them ends all of them, with one line."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from fasthpm.errors import AgreedError, UserError


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
