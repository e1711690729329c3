"""At which rate a probe's clips are read."""

import dataclasses

from fasthpm.cli import Parser
from fasthpm.errors import UserError
from fasthpm.recipe import Recipe


def add_sampling_rate(parser: Parser) -> None:
    """The flag that says it."""
    parser.add_argument(
        "--sampling_rate",
        type=int,
        default=0,
        help="of videos: a clip takes every how many-th frame; 0 = as in pretraining (default)",
    )


def at_rate(recipe: Recipe, rate: int) -> Recipe:
    """The recipe, its clips read at another rate; 0 = as it is. **Raises:** `UserError` for images, and below 0."""
    if not rate:
        return recipe
    if rate < 0 or recipe.num_frames == 1:
        raise UserError(
            f"sampling_rate is {rate}, "
            + ("expected 0 or more" if rate < 0 else "but the model takes images; leave --sampling_rate out")
        )
    return dataclasses.replace(recipe, sampling_rate=rate)
