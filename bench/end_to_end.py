"""Data and step together, through the public command: images per second, epoch time, data wait.

    python -m bench.end_to_end --data_path in1k_train.beton [--recipe hpm_vit_base_in1k_200e] [-o end_to_end.json]

MAE, exact HPM and the fast preset take turns, each in a process of its own per round; ratios are of one round. The
figures are the runs' own metrics without their first reading.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import add_run_arguments, machine, ratios, say, show, spread, table, write_json
from bench.training import READ, train
from fasthpm.cli import Parser, run_command
from fasthpm.data.build import read_info
from fasthpm.errors import UserError

METHODS: dict[str, tuple[str, ...]] = {
    "mae": ("--mask_policy", "random", "--predict_loss", "none"),
    "hpm": (),
    "hpm_fast": ("--teacher_maps", "--predictor", "shared", "--decoder_attention", "cross"),
}


def flags_of(arguments: argparse.Namespace, method: str) -> list[str]:
    """`fasthpm pretrain`'s command line of a method."""
    names = ("recipe", "data_path", "batch_size", "num_workers", "deepspeed_config")
    flags = [part for name in names for part in (f"--{name}", str(getattr(arguments, name)))]
    batch = str(arguments.batch_size * arguments.ranks)
    return [*flags, "--global_batch_size", batch, *METHODS[method], *arguments.extra.split()]


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """What every method's run says of itself, round by round."""
    found: dict[str, list[dict[str, float]]] = {method: [] for method in arguments.methods}
    with tempfile.TemporaryDirectory(prefix="fasthpm-bench-") as work:
        for number in range(arguments.rounds):
            for method in arguments.methods:
                say(f"round {number + 1}: {method}")
                flags = flags_of(arguments, method)
                found[method].append(
                    train(Path(work) / method, flags, ranks=arguments.ranks, updates=arguments.updates)
                )
    return found


def summary(arguments: argparse.Namespace) -> dict[str, Any]:
    """Spreads, ratios within rounds, epoch time."""
    rounds = measure(arguments)
    samples = read_info(arguments.data_path).num_samples
    rates = {name: [one["images_per_second"] for one in values] for name, values in rounds.items()}
    return {
        "bench": "end_to_end",
        "recipe": arguments.recipe,
        "data_path": Path(arguments.data_path).name,
        "batch_size": arguments.batch_size,
        "ranks": arguments.ranks,
        "updates": arguments.updates,
        "rounds": rounds,
        "figures": {
            name: {key: spread([one[key] for one in values]) for key in READ} for name, values in rounds.items()
        },
        "epoch_seconds": {name: samples / spread(values)["median"] for name, values in rates.items()},
        "time_over_mae": {name: ratios(rates["mae"], values) for name, values in rates.items() if "mae" in rates},
        "machine": machine(),
    }


def report(result: dict[str, Any]) -> str:
    """A Markdown table."""
    rows = []
    for name, figures in result["figures"].items():
        over = result["time_over_mae"].get(name)
        rows.append(
            [
                name,
                show(figures["images_per_second"], 1),
                f"{result['epoch_seconds'][name]:.0f}",
                show(figures["data_wait_percent"], 1),
                show(over) if over else "",
            ]
        )
    return table(("method", "images/s", "epoch s", "data wait %", "time over MAE"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.end_to_end`."""
    parser = Parser(prog="python -m bench.end_to_end", description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--ranks", type=int, default=1, help="processes, one per GPU")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.updates, arguments.ranks) < 1:
        raise UserError("rounds, updates and ranks must be 1 or more")
    result = summary(arguments)
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
