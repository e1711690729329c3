"""Does HPM help BEiT? Tokens of a k-means codebook on Fashion-MNIST, by BEiT's blocks, at random and by difficulty.

    python -m bench.evidence_beit --data data/fashion_mnist --work runs/beit [--length short] [--seeds 3]
        [--methods …] [-o bench/results/beit_fashion_short.json]

The codebook (256 codes of 4 x 4 pixels) is made once, in --work, from the training images. Runs, lengths and probes are
those of `bench.evidence_difficulty`: one process per run, finished ones are kept, the tables are rewritten after every
run. Differences are taken seed by seed, to random masks with the same model, whose encoder is probed untrained, too.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import fast_config, json_file, machine, table, write_json
from bench.evidence import RESULT, fill_table, flag, ran_one, require_positive, start, train, write_both
from bench.evidence_difficulty import LENGTHS, SETS, TRUTH, mean_and_spread, probe
from data_prep import codebook
from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError
from fasthpm.recipes.beit import DEMO_TOKENS

PROBES = ("knn", "linear")
SETTINGS = ("length", "bank", "extra")
BOOK = "codebook.safetensors"
ALONE: dict[str, Any] = {"predict_loss": "none"}
BASELINE, UNTRAINED = "random", "untrained"


@dataclass(frozen=True)
class Method:
    """A row of the table: changes to beit_demo, and the row with random masks that it is compared with."""

    title: str
    fields: dict[str, Any]
    control: str = ""


METHODS = {
    "beit": Method("BEiT, blocks", {**ALONE, "mask_policy": "blockwise"}, "random"),
    "random": Method("BEiT, random masks", {**ALONE, "mask_policy": "random"}),
    "measured": Method("HPM, measured", {**ALONE, "mask_policy": "hpm", "difficulty": "measured"}, "random"),
    "in_place": Method("HPM, in place", {**ALONE, "mask_policy": "hpm", "difficulty": "in_place"}, "random"),
    "random_predictor": Method(
        "BEiT, random masks, loss predictor", {"mask_policy": "random", "predict_loss": "relative"}, "random"
    ),
    "paper": Method(
        "HPM, paper's question",
        {"mask_policy": "hpm", "predict_loss": "relative", "difficulty": "paper"},
        "random_predictor",
    ),
}


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every run of a table shares."""
    return {name: getattr(arguments, name) for name in SETTINGS}


def make_codebook(arguments: argparse.Namespace) -> Path:
    """The codebook of all runs, made if it is not there."""
    path: Path = arguments.work / BOOK
    if not path.is_file():
        arguments.work.mkdir(parents=True, exist_ok=True)
        train = str(arguments.data / SETS["fashion"].paths[0])
        sizes = {"size": DEMO_TOKENS, "patch_size": 4, "input_size": 28, "channels": 1, "crop_min": 0.5}
        codebook.main([train, str(path), *(part for name, value in sizes.items() for part in flag(name, value))])
    return path


def fields_of(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """The recipe's fields for a row of the table."""
    epochs, steps, batch = LENGTHS[arguments.length]
    return {
        "epochs": epochs,
        "steps_per_epoch": steps,
        "batch_size": batch,
        "global_batch_size": batch,
        "ema_ramp_epochs": epochs,
        "warmup_epochs": 0.05 * epochs,
        "difficulty_every": steps * epochs // 4,
        **METHODS[method].fields,
    }


def train_flags(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> list[str]:
    """`fasthpm pretrain`'s command line for one cell of the table."""
    paths = [arguments.data / name for name in SETS["fashion"].paths]
    where = {
        "data_path": paths[0],
        "val_path": paths[1],
        "output_dir": out,
        "seed": seed,
        "num_workers": 1,
        "deepspeed_config": arguments.deepspeed_config,
        "target_weights": f"kmeans:{arguments.work / BOOK}",
        "save_every": LENGTHS[arguments.length][0],
        "panel_every": 0,
    }
    pairs = {**where, **fields_of(arguments, method)}
    flags = [part for name, value in pairs.items() for part in flag(name, value)]
    return ["--recipe", "beit_demo", *flags, *arguments.extra.split()]


def run_one(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> None:
    """Train and probe one cell in this process, and write its figures to OUT/evidence.json last of all."""
    taken, last = train(train_flags(arguments, method, seed, out), fields_of(arguments, method), out)
    of_set = argparse.Namespace(**{**vars(arguments), "set": "fashion"})
    result = {
        "method": method,
        "seed": seed,
        "settings": settings_of(arguments),
        "probes": probe(of_set, out),
        "truth": {name: last[name] for name in TRUTH if name in last},
        **taken,
        "last": {name: last[name] for name in ("step", "reconstruction_loss") if name in last},
    }
    if method == BASELINE:
        result[UNTRAINED] = probe(of_set, out, UNTRAINED)
    write_json(out / RESULT, result)


def summarise(
    runs: Sequence[dict[str, Any]], methods: Mapping[str, Method] = METHODS, probes: Sequence[str] = PROBES
) -> dict[str, Any]:
    """{method: {"seeds", probe or truth: summary, "gain": {probe: summary of differences to its control}}}, the
    untrained encoder first."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["method"], {})[run["seed"]] = run
        if UNTRAINED in run:
            found.setdefault(UNTRAINED, {})[run["seed"]] = {"probes": run[UNTRAINED], "truth": {}}
    rows: dict[str, Any] = {}
    for method in (one for one in (UNTRAINED, *methods) if one in found):
        seeds, others = found[method], found.get(methods[method].control, {}) if method in methods else {}
        row: dict[str, Any] = {"seeds": sorted(seeds)}
        row |= {name: mean_and_spread([run["probes"][name] for run in seeds.values()]) for name in probes}
        for truth in TRUTH:
            values = [run["truth"][truth] for run in seeds.values() if truth in run["truth"]]
            row |= {truth: mean_and_spread(values)} if values else {}
        both = sorted(set(seeds) & set(others))
        gains = {name: [seeds[s]["probes"][name] - others[s]["probes"][name] for s in both] for name in probes}
        row |= {"gain": {name: mean_and_spread(values) for name, values in gains.items()}} if both else {}
        rows[method] = row
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table, as it stands in `results/`."""
    epochs, steps, batch = LENGTHS[result["settings"]["length"]]
    rows = []
    for method, row in result["summary"].items():
        figures = [f"{row[name]['mean']:.2f} ± {row[name]['std']:.2f}" for name in PROBES]
        truth = f"{row[TRUTH[0]]['mean']:.2f} ({row[TRUTH[0]]['low']:.2f})" if TRUTH[0] in row else ""
        gain = [f"{g['mean']:+.2f} ± {g['std']:.2f} ({g['won']})" for g in row.get("gain", {}).values()] or ["", ""]
        title = METHODS[method].title if method in METHODS else "untrained encoder"
        rows.append([title, str(len(row["seeds"])), truth, *figures, *gain])
    heads = ("masks", "seeds", "difficulty_spearman (lowest)", "k-NN", "linear", "k-NN, less control", "linear, less")
    about = (
        f"Fashion-MNIST, {epochs * steps:,} updates of {batch}, nano ViT with 4-pixel patches, {DEMO_TOKENS} k-means "
        f"tokens, 38 % masked; α 0 → 0.5. Accuracies in percent, mean ± standard deviation over seeds; differences "
        f"seed by seed to random masks with the same model, in brackets how many seeds are ahead."
    )
    return "\n\n".join(["# HPM on BEiT", about, table(heads, rows)]) + "\n"


def write_tables(arguments: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    """JSON and Markdown of the runs that are there, each replaced as a whole."""
    result = {"settings": settings_of(arguments), "machine": machine(), "summary": summarise(runs), "runs": list(runs)}
    write_both(arguments.output, result, markdown(result))


def build_parser(name: str, about: str | None, methods: Mapping[str, Method]) -> Parser:
    """The command line of `bench.evidence_NAME`, a table of `methods` on Fashion-MNIST."""
    parser = Parser(prog=f"bench.evidence_{name}", description=about)
    parser.add_argument("--data", type=Path, default=Path("data/fashion_mnist"), help="where train.beton is")
    parser.add_argument("--work", type=Path, default=Path(f"runs/{name}"), help="where everything is kept")
    parser.add_argument("--length", choices=list(LENGTHS), default="short")
    parser.add_argument("--methods", nargs="+", choices=list(methods), default=list(methods))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--bank", type=int, default=10000, help="labelled training images of the probes")
    parser.add_argument("--extra", default="", help="further flags of every run, as one string")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in a run")
    parser.add_argument("--deepspeed_config", default=fast_config())
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # METHOD:SEED, in the process started for it
    default = f"default: bench/results/{name}_fashion_….json"
    parser.add_argument("-o", "--output", type=json_file, default=None, help=default)
    return parser


def complete(arguments: argparse.Namespace, name: str) -> None:
    """Check the arguments of `build_parser`, and say where the table goes. **Raises:** `UserError`."""
    require_positive(arguments, ("seeds", "bank", "threads"))
    for path in SETS["fashion"].paths:
        if not (arguments.data / path).exists():
            raise UserError(f"{arguments.data} has no {path}; make it with python -m data_prep.fashion_mnist")
    arguments.output = arguments.output or Path(f"bench/results/{name}_fashion_{arguments.length}.json")


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.evidence_beit`."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser("beit", __doc__, METHODS).parse_args(given)
    if ran_one(arguments, run_one):
        return
    complete(arguments, "beit")
    make_codebook(arguments)
    fill_table(
        arguments,
        settings_of(arguments),
        start_one=lambda method, seed: start(arguments, given, method, seed, "bench.evidence_beit"),
        write=lambda runs: write_tables(arguments, runs),
    )


if __name__ == "__main__":
    run_command(main)
