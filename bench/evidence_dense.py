"""Does pretraining help segmentation and detection? Garments on photographs, each run beside the same from scratch.

    python -m bench.evidence_dense --data data/scenes --work runs/dense_evidence [--seeds 3] [--epochs 24]
        [--pretraining …] [--shared]
        [--methods segment segment_scratch detect detect_scratch] [-o bench/results/dense_scenes.json]

--data is what `python -m data_prep.scenes --size 96 --objects 2 5` writes, with train_set.beton (`data_prep.images`)
beside it. Per seed one pretraining by `hpm_dense_demo`, or with --shared one for all, then every task from it and from
random weights, by the same number of updates, with the tasks' `small` recipes. One process per cell; finished ones are
kept, interrupted ones resume. It tests the plumbing and compares two ways: the set is drawn, and nobody has published
figures on it.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import fast_config, json_file, machine, table, write_json
from bench.evidence import RESULT, fill_table, ran_one, require_positive, start, summary_of, write_both
from fasthpm import pretrain
from fasthpm.cli import Parser, run_command
from fasthpm.entry import COMMANDS
from fasthpm.errors import UserError

TASKS = {"segment": ("miou", "macc", "aacc"), "detect": ("mask_ap", "box_ap")}  # and their figures, the first counts
SCRATCH = "_scratch"
METHODS = [f"{task}{end}" for task in TASKS for end in ("", SCRATCH)]


def pretrained(arguments: argparse.Namespace, seed: int) -> Path:
    """The run that the tasks of a seed start from, made or completed if it is not there."""
    seed = 0 if arguments.shared else seed
    out = arguments.work / f"pretrain-seed{seed}"
    if not (out / "report.md").is_file():
        source = (arguments.pretraining or arguments.data) / "train_set.beton"
        flags = {"data_path": source, "output_dir": out, "seed": seed, "num_workers": 1, **schedule(arguments.epochs)}
        flags["deepspeed_config"] = fast_config()
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        pretrain.main(["--recipe", "hpm_dense_demo", "--batch_size", "64", *words])
    return out


def schedule(epochs: int) -> dict[str, int]:
    """The recipe's fields for a pretraining of `epochs`: its teacher is asked for maps about five times."""
    return {"epochs": epochs, "ema_ramp_epochs": epochs, "map_refresh_epochs": max(1, round(epochs / 5))}


def task_of(method: str) -> str:
    """The command of a row."""
    return method.removesuffix(SCRATCH)


def run_one(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> None:
    """One cell in this process; its figures go to OUT/evidence.json last of all."""
    run, task = pretrained(arguments, seed), task_of(method)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    flags: dict[str, Any] = {"data_path": arguments.data, "output_dir": out / task, "seed": seed}
    if arguments.steps:
        flags["steps"] = arguments.steps
    if method.endswith(SCRATCH):
        flags["from_scratch"] = True
    found = importlib.import_module(COMMANDS[task][0]).main({"run": run, **flags})
    if not found.finished:
        raise UserError(f"{method}, seed {seed} was stopped before its end; start again to go on")
    result = {
        "method": method,
        "seed": seed,
        "settings": settings_of(arguments),
        "probes": {name: found.figures[name] for name in TASKS[task] if name in found.figures},
        "figures": found.figures,
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - begin_cpu,
    }
    write_json(out / RESULT, result)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every run of a table shares."""
    return {"steps": arguments.steps, "epochs": arguments.epochs, "shared": arguments.shared}


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{method: {"seeds", figure: summary, "gain": {figure: summary of differences to scratch, seed by seed}}}."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        found.setdefault(run["method"], {})[run["seed"]] = run["probes"]
    rows: dict[str, Any] = {}
    for method in (one for one in METHODS if one in found):
        seeds, names = found[method], TASKS[task_of(method)]
        rows[method] = {"seeds": sorted(seeds)}
        rows[method] |= {name: summary_of([figures[name] for figures in seeds.values()]) for name in names}
        scratch = found.get(f"{method}{SCRATCH}", {})
        paired = sorted(seeds.keys() & scratch.keys())
        if paired:
            gains = {name: [seeds[seed][name] - scratch[seed][name] for seed in paired] for name in names}
            rows[method]["gain"] = {
                name: {**summary_of(values), "won": sum(value > 0 for value in values)}
                for name, values in gains.items()
            }
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table, as it stands in `results/`."""
    rows, settings = [], result["settings"]
    for method, row in result["summary"].items():
        for name in TASKS[task_of(method)]:
            gain = row.get("gain", {}).get(name)
            figures = (f"{row[name]['mean']:.2f} ± {row[name]['std']:.2f}", f"{row[name]['low']:.2f}")
            less = f"{gain['mean']:+.2f} ± {gain['std']:.2f} ({gain['won']})" if gain else ""
            rows.append([method, name, str(len(row["seeds"])), *figures, less])
    heads = ("run", "figure", "seeds", "mean ± deviation", "lowest", "less from scratch")
    about = (
        f"Garments on photographs, 96 px, the demo's nano ViT: pretrained by `hpm_dense_demo` for "
        f"{settings['epochs']} epochs ({'one run for all seeds' if settings['shared'] else 'one run per seed'}), and "
        f"from scratch (`_scratch`), by the same updates of the tasks' `small` recipes. In percent; deviation over "
        f"seeds, in brackets how many are ahead."
    )
    return "\n\n".join(["# Segmentation and detection", about, table(heads, rows)]) + "\n"


def write_tables(arguments: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    """JSON and Markdown of the runs that are there, each replaced as a whole."""
    result = {"settings": settings_of(arguments), "machine": machine(), "summary": summarise(runs), "runs": list(runs)}
    write_both(arguments.output, result, markdown(result))


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="bench.evidence_dense", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/scenes"), help="scenes, with train_set.beton")
    parser.add_argument("--pretraining", type=Path, help="other scenes, with train_set.beton, to pretrain on")
    parser.add_argument("--work", type=Path, default=Path("runs/dense_evidence"), help="where the runs are kept")
    parser.add_argument("--epochs", type=int, default=24, help="of the pretraining")
    parser.add_argument("--shared", action="store_true", help="the tasks of every seed start from one pretraining")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--steps", type=int, default=0, help="updates of every task (default: its small recipe's)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in a run")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # METHOD:SEED, in the process started for it
    parser.add_argument("-o", "--output", type=json_file, default=Path("bench/results/dense_scenes.json"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.evidence_dense`."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(given)
    if ran_one(arguments, run_one):
        return
    require_positive(arguments, ("seeds", "threads", "epochs"))
    needed = [arguments.data / "train", arguments.data / "val"]
    for path in (*needed, (arguments.pretraining or arguments.data) / "train_set.beton"):
        if not path.exists():
            raise UserError(f"there is no {path}; make it with data_prep.scenes and data_prep.images")
    fill_table(
        arguments,
        settings_of(arguments),
        start_one=lambda method, seed: start(arguments, given, method, seed, "bench.evidence_dense"),
        write=lambda runs: write_tables(arguments, runs),
    )


if __name__ == "__main__":
    run_command(main)
