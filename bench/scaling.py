"""One step over ranks, accumulation and ZeRO stages, through the public command.

    python -m bench.scaling [--ranks 1 2] [--accumulation 1 2] [--stages 0 1 2 3] [-o scaling.json]

The global batch grows with the ranks (batch_size per rank and micro-step stays). Efficiency is images per second and
rank over those of one rank, no accumulation and the same stage, in the same round.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import add_run_arguments, machine, ratios, say, show, spread, table, write_json
from bench.training import train
from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError


def cases(arguments: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(stage, ranks, accumulation)."""
    return [(s, r, a) for s in arguments.stages for r in arguments.ranks for a in arguments.accumulation]


def flags_of(arguments: argparse.Namespace, stage: int, ranks: int, accumulation: int) -> list[str]:
    """`fasthpm pretrain`'s command line of a case."""
    values = {
        "recipe": arguments.recipe,
        "data_path": arguments.data_path,
        "batch_size": arguments.batch_size,
        "global_batch_size": arguments.batch_size * ranks * accumulation,
        "num_workers": arguments.num_workers,
        "deepspeed_config": f"zero{stage}_bf16",
    }
    return [*(part for name, value in values.items() for part in (f"--{name}", str(value))), *arguments.extra.split()]


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Images per second of every case, round by round."""
    found: dict[str, list[float]] = {name_of(case): [] for case in cases(arguments)}
    with tempfile.TemporaryDirectory(prefix="fasthpm-bench-") as work:
        for number in range(arguments.rounds):
            for case in cases(arguments):
                say(f"round {number + 1}: {name_of(case)}")
                read = train(Path(work) / "run", flags_of(arguments, *case), ranks=case[1], updates=arguments.updates)
                found[name_of(case)].append(read["images_per_second"])
    return found


def name_of(case: tuple[int, int, int]) -> str:
    """`stage S, R ranks, accumulation A`."""
    return f"stage {case[0]}, {case[1]} ranks, accumulation {case[2]}"


def summary(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates and efficiencies."""
    rates = measure(arguments)
    efficiency = {}
    for case in cases(arguments):
        base = rates.get(name_of((case[0], 1, 1)))
        if base:
            efficiency[name_of(case)] = ratios([rate / case[1] for rate in rates[name_of(case)]], base)
    return {
        "bench": "scaling",
        "recipe": arguments.recipe,
        "batch_size": arguments.batch_size,
        "rounds": rates,
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "efficiency": efficiency,
        "machine": machine(),
    }


def report(result: dict[str, Any]) -> str:
    """A Markdown table."""
    rows = [
        [name, show(value, 1), show(result["efficiency"][name]) if name in result["efficiency"] else ""]
        for name, value in result["images_per_second"].items()
    ]
    return table(("case", "images/s", "efficiency"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.scaling`."""
    parser = Parser(prog="python -m bench.scaling", description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", choices=(0, 1, 2, 3), default=[1])
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.updates, *arguments.ranks, *arguments.accumulation) < 1:
        raise UserError("rounds, updates, ranks and accumulation must be 1 or more")
    result = summary(arguments)
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
