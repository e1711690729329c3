"""What to say when a GPU's memory runs out: what fills it, and which batch would fit."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from fasthpm.commands.dry_run import Held, dry_run
from fasthpm.commands.plan import fitting_batch, precision, used
from fasthpm.errors import UserError
from fasthpm.ranks import Launch
from fasthpm.recipe import Recipe
from fasthpm.speed import gpus
from fasthpm.speed.gpus import GIB

SAMPLES = 10**9  # of a data set: any number does, as memory does not depend on it
LARGEST = 3  # kinds of tensors that are named


@contextmanager
def explained(recipe: Recipe, launch: Launch, where: Callable[[], str]) -> Iterator[None]:
    """Turn out-of-memory of a GPU into one line on every rank that meets it: what fills the memory and what would fit.

    - `where`: how far the run had come

    **Raises:** `UserError` in its place, which the ranks have not agreed on: the process must end.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = describe(recipe, launch, where(), str(error))
        found = UserError(line)
        if launch.world_size > 1:
            tqdm.write(f"fasthpm: error: {line}\n", end="", file=sys.stderr)  # in one piece, below the progress bar
            found.printed_elsewhere = True  # the command lingers for the slower ones
        raise found from error


def describe(recipe: Recipe, launch: Launch, where: str, message: str) -> str:
    """The line. `message`: torch's, which says how much was asked for."""
    rank = f"rank {launch.rank}: " if launch.world_size > 1 else ""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", message)
    head = f"{rank}the memory of {launch.device} ran out {where}" + (
        f" ({asked[1]} more were asked for)" if asked else ""
    )
    try:
        return f"{head}: {advice(recipe, launch)}"
    except UserError as error:  # nothing fits
        return f"{head}: {error}"
    except Exception as error:  # a model that fails must not hide what has happened
        return f"{head}; take a smaller --batch_size than {recipe.batch_size} (what would fit is not known: {error!r})"


def advice(recipe: Recipe, launch: Launch) -> str:
    """What the batch holds and which one would fit, by the memory model of `fasthpm plan`.

    **Raises:** `UserError` if none does.
    """
    world_size = launch.world_size
    gpu, _ = gpus.installed(launch.device)
    recipe = recipe.resolve(SAMPLES, world_size)
    found = dry_run(recipe, gpu, bf16=precision(recipe, world_size)[1])
    smaller = fitting_batch(recipe, gpu, world_size, SAMPLES, found).resolve(SAMPLES, world_size)
    needs = used(smaller, found, world_size) - found.activations * (1 - smaller.batch_size / recipe.batch_size)
    return (
        f"activations of batch_size {recipe.batch_size} take {found.activations / GIB:.1f} GiB, the largest of them "
        f"{', '.join(map(described, found.held[:LARGEST]))}; --batch_size {smaller.batch_size} is predicted to fit "
        f"({needs / GIB:.1f} of {gpu.memory / GIB:.1f} GiB): start the same command with --batch_size "
        f"{smaller.batch_size} --global_batch_size {smaller.global_batch_size} to go on from the last checkpoint with "
        f"the same updates"
    )


def described(held: Held) -> str:
    """Tensors of one kind in a few words."""
    kind = str(held.dtype).removeprefix("torch.")
    return f"{held.number} x {list(held.shape)} {kind} = {held.bytes / GIB:.2g} GiB"
