"""Does HPM help iBOT? Several views of Fashion-MNIST's garments, masked at random and by difficulty.

    python -m bench.evidence_ibot --data data/fashion_mnist --work runs/ibot [--length short] [--seeds 3] [--methods …]
        [-o bench/results/ibot_fashion_short.json]

Rows are changes to `ibot_demo`, whose length is the short one, in bench.evidence's runs: one process per run, finished
ones are kept, the tables are rewritten after every run. k-NN and logistic regression on the cls token, which iBOT is
made for, and on the mean of the patch tokens; the untrained network beside them, and the two figures in which a
collapse shows. Differences are taken seed by seed, to random masks.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import machine, table, write_json
from bench.evidence import RESULT, fill_table, flag, probe, ran_one, start, train, write_both
from bench.evidence_beit import BASELINE, UNTRAINED, Method, build_parser, complete, summarise
from bench.evidence_difficulty import TRUTH, mean_and_spread
from fasthpm.cli import run_command

PROBES = ("knn_cls", "linear_cls", "knn_mean", "linear_mean")
SHOWN = ("teacher_entropy", "mean_entropy", "rankme", "teacher_spearman")
SETTINGS = ("length", "bank", "extra")
LENGTHS = {"short": (4, 250, 64), "long": (20, 250, 64)}  # epochs, updates per epoch, samples per update
METHODS = {
    "random": Method("iBOT, random masks", {"mask_policy": "random"}),
    "ibot": Method("iBOT, blocks", {"mask_policy": "blockwise"}, "random"),
    "hpm": Method("HPM on iBOT, in place", {"mask_policy": "hpm", "difficulty": "in_place"}, "random"),
}


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every run of a table shares."""
    return {name: getattr(arguments, name) for name in SETTINGS}


def fields_of(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """The recipe's fields for a row of the table."""
    epochs, steps, batch = LENGTHS[arguments.length]
    return {
        "epochs": epochs,
        "steps_per_epoch": steps,
        "batch_size": batch,
        "global_batch_size": batch,
        "warmup_epochs": 0.1 * epochs,
        "difficulty_every": steps * epochs // 2,
        **METHODS[method].fields,
    }


def train_flags(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> list[str]:
    """`fasthpm pretrain`'s command line for one cell of the table."""
    where = {
        "data_path": arguments.data / "train.beton",
        "val_path": arguments.data / "val.beton",
        "output_dir": out,
        "seed": seed,
        "num_workers": 1,
        "deepspeed_config": arguments.deepspeed_config,
        "save_every": 2,  # an interrupted cell goes on
        "panel_every": 0,
    }
    pairs = {**where, **fields_of(arguments, method)}
    flags = [part for name, value in pairs.items() for part in flag(name, value)]
    return ["--recipe", "ibot_demo", *flags, *arguments.extra.split()]


def run_one(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> None:
    """Train and probe one cell in this process, and write its figures to OUT/evidence.json last of all."""
    taken, last = train(train_flags(arguments, method, seed, out), fields_of(arguments, method), out)
    result = {
        "method": method,
        "seed": seed,
        "settings": settings_of(arguments),
        "probes": probe(arguments, out, "student"),
        "truth": {name: last[name] for name in TRUTH if name in last},
        **taken,
        "last": {name: last[name] for name in ("step", "cls_loss", "patch_loss", *SHOWN) if name in last},
    }
    if method == BASELINE:
        result[UNTRAINED] = probe(arguments, out, UNTRAINED)
    write_json(out / RESULT, result)


def summary_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`evidence_beit.summarise` of these rows, of the untrained networks, and the last of `SHOWN`."""
    rows = summarise(runs, METHODS, PROBES)
    for method in (name for name in METHODS if name in rows):
        last = [run["last"] for run in runs if run["method"] == method]
        for name in SHOWN:
            values = [one[name] for one in last if name in one]
            rows[method] |= {name: mean_and_spread(values)} if values else {}
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table, as it stands in `results/`."""
    epochs, steps, batch = LENGTHS[result["settings"]["length"]]
    rows = []
    for method, row in result["summary"].items():
        figures = [f"{row[name]['mean']:.2f} ± {row[name]['std']:.2f}" for name in PROBES]
        shown = [f"{row[name]['mean']:.2f}" if name in row else "" for name in (*SHOWN, TRUTH[0])]
        gain = [f"{g['mean']:+.2f} ± {g['std']:.2f} ({g['won']})" for g in row.get("gain", {}).values()] or [""] * 4
        title = METHODS[method].title if method in METHODS else method
        rows.append([title, str(len(row["seeds"])), *figures, *gain, *shown])
    probes = ("k-NN cls", "linear cls", "k-NN mean", "linear mean")
    heads = ("masks", "seeds", *probes, *(f"{name}, less random" for name in probes), *SHOWN, TRUTH[0])
    about = (
        f"Fashion-MNIST, {epochs * steps:,} updates of {batch} images, two views each; the rest as in ibot_demo; α 0 "
        f"→ 0.5. Accuracies in percent, of the student, mean ± standard deviation over seeds; differences seed by seed "
        f"to random masks, in brackets how many seeds are ahead. Entropies in nats, at the last reading."
    )
    return "\n\n".join(["# HPM on iBOT", about, table(heads, rows)]) + "\n"


def write_tables(arguments: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    """JSON and Markdown of the runs that are there, each replaced as a whole."""
    result = {"settings": settings_of(arguments), "machine": machine(), "summary": summary_of(runs), "runs": list(runs)}
    write_both(arguments.output, result, markdown(result))


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.evidence_ibot`."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser("ibot", __doc__, METHODS).parse_args(given)
    if ran_one(arguments, run_one):
        return
    complete(arguments, "ibot")
    fill_table(
        arguments,
        settings_of(arguments),
        start_one=lambda method, seed: start(arguments, given, method, seed, "bench.evidence_ibot"),
        write=lambda runs: write_tables(arguments, runs),
    )


if __name__ == "__main__":
    run_command(main)
