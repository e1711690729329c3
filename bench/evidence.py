"""Does the mask matter? The papers' ablation on Fashion-MNIST: equal epochs, several seeds, k-NN and linear accuracy.

    python -m bench.evidence --data data/fashion_mnist --work runs/evidence [--seeds 3] [--epochs 20]
        [--finetune 2] [-o bench/results/evidence_images.json]

One process per run, through the public training path with the demo's model; seeds take turns with methods, so that a
table stopped early is still fair. Finished runs are kept under --work and skipped when the command is given again; an
interrupted one resumes. The JSON and the Markdown beside it are rewritten after every run.

Probes: features of all patches seen, mean of the patch tokens and cls; the first --bank training images vote (k-NN of
DINO, best k) or train a multinomial logistic regression on standardised features (L-BFGS, float64); all test images.
--finetune N adds N epochs of `fasthpm finetune` on the same images, also to runs that are there already; the untrained
encoder's is the same network from random weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import evidence_finetune
from bench.common import fast_config, json_file, machine, say, table, write_json
from fasthpm.checkpoint.weights import load_weights
from fasthpm.cli import Parser, run_command
from fasthpm.data import build_loader
from fasthpm.errors import UserError
from fasthpm.files import file_hash, write_text
from fasthpm.patches import patches_for
from fasthpm.probes import knn
from fasthpm.run.records import read_metrics

PAPERS: dict[str, Any] = {"difficulty": "paper", "predict_loss": "relative"}  # where a method does not say otherwise
METHODS: dict[str, dict[str, Any]] = {
    "mae": {"model": "mae_vit_nano_patch4_28", "mask_policy": "random", "predict_loss": "none"},
    "random": {"mask_policy": "random"},
    "hpm": {},
    "argmin": {"mask_policy": "hpm_easiest"},
    "hard_to_easy": {"alpha_start": 0.5, "alpha_end": 0.0},
    "all_hard": {"alpha_start": 1.0, "alpha_end": 1.0},
    "hpm_fast": {"teacher_maps": True, "map_refresh_epochs": 10, "predictor": "shared", "decoder_attention": "cross"},
}
TITLES = {
    "untrained": "untrained encoder",
    "mae": "MAE",
    "random": "MAE + difficulty loss (random masks)",
    "hpm": "HPM, α 0 → 0.5",
    "argmin": "argmin, α 0 → 0.5",
    "hard_to_easy": "hard to easy, α 0.5 → 0",
    "all_hard": "only the hardest, α 1 → 1",
    "hpm_fast": "HPM in fast modes, α 0 → 0.5",
}
PAPER = {  # ViT-B/16, ImageNet-1K, 200 epochs: fine-tune, linear, k-NN top-1 (TPAMI); None = not reported
    "mae": (82.23, 50.80, 29.84),
    "random": (82.49, 51.26, 31.98),
    "hpm": (82.95, 54.92, 36.09),
    "argmin": (82.36, None, None),
    "hard_to_easy": (81.71, None, None),
    "all_hard": (81.40, None, None),
}
PROBES = ("knn_mean", "linear_mean", "knn_cls", "linear_cls")
FINETUNE = "finetune"  # a further probe, where --finetune is given
HEADS = {
    "knn_mean": "k-NN, mean",
    "linear_mean": "linear, mean",
    "knn_cls": "k-NN, cls",
    "linear_cls": "linear, cls",
    FINETUNE: "fine-tune",
}
BASELINE = "random"  # what the paired differences are taken against
RESULT, SETTINGS = "evidence.json", ("epochs", "steps_per_epoch", "batch_size", "bank", "extra")
PENALTY = 1e-4  # L2 on the logistic regression's weights, per sample
ENCODE_BATCH = 500


# ------------------------------------------------------------------------------------------------------ one run
def train_flags(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> list[str]:
    """`fasthpm pretrain`'s command line for one cell of the table."""
    length = {
        "epochs": arguments.epochs,
        "steps_per_epoch": arguments.steps_per_epoch,
        "ema_ramp_epochs": arguments.epochs,
        "warmup_epochs": 0.05 * arguments.epochs,
        "batch_size": arguments.batch_size,
        "global_batch_size": arguments.batch_size,
        "save_every": arguments.epochs,
        "panel_every": 0,
    }
    where = {
        "data_path": arguments.data / "train.beton",
        "output_dir": out,
        "seed": seed,
        "num_workers": 1,
        "deepspeed_config": arguments.deepspeed_config,
    }
    pairs = {**length, **where, **PAPERS, **METHODS[method]}
    flags = [part for name, value in pairs.items() for part in flag(name, value)]
    return ["--recipe", "hpm_demo", *flags, *arguments.extra.split()]


def flag(name: str, value: object) -> list[str]:
    """One recipe field on the command line; a switch stands alone."""
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{name}"]
    return [f"--{name}", str(value)]


def run_one(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> None:
    """Train and probe one cell in this process, and write its figures to OUT/evidence.json last of all."""
    from fasthpm import pretrain

    begin, begin_cpu = time.perf_counter(), time.process_time()
    pretrain.main(train_flags(arguments, method, seed, out))
    check_complete(arguments, out)
    trained, trained_cpu = time.perf_counter(), time.process_time()
    result = {
        "method": method,
        "seed": seed,
        "settings": settings_of(arguments),
        "probes": probe(arguments, out, "student"),
        "train_seconds": trained - begin,
        "train_cpu_seconds": trained_cpu - begin_cpu,
        "last": last_metrics(out),
    }
    if method == BASELINE:
        result["untrained"] = probe(arguments, out, "untrained")
    result["probe_seconds"] = time.perf_counter() - trained
    write_json(out / RESULT, result)


def train(flags: list[str], fields: dict[str, Any], out: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Pretrain to the end by the command's `flags`; `fields` has its lengths. Seconds that it took, and last metrics.

    **Raises:** `UserError` for a run that was stopped before its end.
    """
    from fasthpm import pretrain

    begin, begin_cpu = time.perf_counter(), time.process_time()
    pretrain.main(flags)
    check_complete(argparse.Namespace(epochs=fields["epochs"], steps_per_epoch=fields["steps_per_epoch"]), out)
    taken = {"train_seconds": time.perf_counter() - begin, "train_cpu_seconds": time.process_time() - begin_cpu}
    return taken, read_metrics(out)[-1]


def check_complete(arguments: argparse.Namespace, out: Path) -> None:
    """**Raises:** `UserError` if training was told to stop before its end, which saves and returns like the end."""
    updates, done = arguments.epochs * arguments.steps_per_epoch, int(last_metrics(out)["step"])
    if done < updates:
        raise UserError(f"{out} was stopped after {done} of {updates} updates; the same command continues")


def last_metrics(out: Path) -> dict[str, float]:
    """What the run logged at its last update."""
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    names = ("step", "reconstruction_loss", "difficulty_loss", "spearman", "teacher_spearman")
    return {name: record[name] for name in names if name in record}


def probe(arguments: argparse.Namespace, out: Path, weights: str) -> dict[str, float]:
    """Every accuracy of `PROBES`, in percent."""
    bank, bank_labels = encode(arguments, out, weights, "train", arguments.bank)
    queries, labels = encode(arguments, out, weights, "val", 0)
    classes, results = int(bank_labels.max()) + 1, {}
    for pool in ("mean", "cls"):
        rows = [F.normalize(side[pool], dim=1) for side in (bank, queries)]
        results[f"knn_{pool}"] = max(knn.knn_accuracy(rows[0], bank_labels, rows[1], labels, classes).values())
        results[f"linear_{pool}"] = linear_accuracy(bank[pool], bank_labels, queries[pool], labels)
    return results


@torch.no_grad()
def encode(
    arguments: argparse.Namespace, out: Path, weights: str, split: str, limit: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Features {"mean", "cls"} float32 [N, D] of the first `limit` (0 = all) images of a split, and labels [N]."""
    model, recipe = load_weights(out, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    options = recipe.loader_options(batch_size=ENCODE_BATCH, train=False, num_workers=1)
    loader = build_loader(arguments.data / f"{split}.beton", options)
    patches_of = patches_for(model, recipe, loader)
    means, tokens, labels, seen = [], [], [], 0
    try:
        for batch in loader:
            encoded = model.encode(patches_of(batch.images.to(device))).float()
            tokens.append(encoded[:, 0])
            means.append(encoded[:, 1:].mean(dim=1))
            labels.append(batch.labels.to(device))
            seen += len(batch.labels)
            if limit and seen >= limit:
                break
    finally:
        loader.close()
    keep = limit or seen
    return {"mean": torch.cat(means)[:keep], "cls": torch.cat(tokens)[:keep]}, torch.cat(labels)[:keep]


def linear_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Top-1 in percent of a multinomial logistic regression, features standardised by the training side's moments.

    - `bank`: [N, D], `queries`: [Q, D]; labels int64
    """
    mean, std = bank.double().mean(0), bank.double().std(0).clamp_min(1e-6)
    inputs, tests = (bank.double() - mean) / std, (queries.double() - mean) / std
    weight = torch.zeros(int(bank_labels.max()) + 1, inputs.shape[1] + 1, dtype=torch.float64, device=bank.device)
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=150, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(inputs, weight[:, :-1], weight[:, -1])
        loss = F.cross_entropy(logits, bank_labels) + PENALTY * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    chosen = F.linear(tests, weight[:, :-1].detach(), weight[:, -1].detach()).argmax(dim=1)
    return 100 * float((chosen == labels).double().mean())


# ------------------------------------------------------------------------------------------------------ the table
def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every run of a table shares."""
    return {name: getattr(arguments, name) for name in SETTINGS}


def finished(settings: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """A run's figures, or None if it has to run. **Raises:** `UserError` if they are of other settings."""
    if not (out / RESULT).is_file():
        return None
    result: dict[str, Any] = json.loads((out / RESULT).read_text())
    if result["settings"] != settings:
        raise UserError(
            f"{out / RESULT} was made with {result['settings']}, not {settings}; use another --work, or the same "
            f"settings"
        )
    return result


def fill_table(
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    start_one: Callable[[str, int], None],
    write: Callable[[list[dict[str, Any]]], None],
    complete: Callable[[Path, dict[str, Any]], dict[str, Any]] = lambda out, result: result,
) -> None:
    """Run every cell that is not there yet, and rewrite the tables after each.

    - `start_one`: runs a cell (method, seed); `write`: the tables of some results; `complete`: a cell's result with
      what is measured later
    """
    runs: list[dict[str, Any]] = []
    cells = [(method, seed) for seed in range(arguments.seeds) for method in arguments.methods]
    for number, (method, seed) in enumerate(cells, 1):
        out, begin = folder_of(arguments, method, seed), time.perf_counter()
        if finished(settings, out) is None:
            start_one(method, seed)
        result = finished(settings, out)
        assert result is not None
        runs.append(complete(out, result))
        figures = ", ".join(f"{name} {value:.2f}" for name, value in runs[-1]["probes"].items())
        say(f"[{number}/{len(cells)}] {method}, seed {seed}: {figures} ({time.perf_counter() - begin:.0f} s)")
        write(runs)
    print(arguments.output.with_suffix(".md").read_text())


def with_finetune(
    arguments: argparse.Namespace,
    out: Path,
    result: dict[str, Any],
    names: tuple[str, str] = ("train.beton", "val.beton"),
) -> dict[str, Any]:
    """`result` with the accuracy of fine-tuning among its probes, measured unless that was done before.

    - `names`: the sets to train and to test on, below `arguments.data`
    """
    train, val = (arguments.data / name for name in names)
    subset = evidence_finetune.labelled_subset(train, arguments.bank, Path(arguments.work))
    same: dict[str, Any] = {"epochs": arguments.finetune, "seed": result["seed"], "threads": arguments.threads}
    paths = (out, subset, val)
    tuned = {FINETUNE: evidence_finetune.finetuned(*paths, **same)}
    made = {**result, "probes": {**result["probes"], **tuned}}
    if "untrained" in result:
        scratch = {FINETUNE: evidence_finetune.finetuned(*paths, **same, from_scratch=True)}
        made["untrained"] = {**result["untrained"], **scratch}
    return made


def probes_of(settings: dict[str, Any]) -> tuple[str, ...]:
    """The probes of a table with these settings."""
    return (*PROBES, FINETUNE) if settings.get(FINETUNE) else PROBES


def summary_of(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation over seeds (0 of one seed), lowest and highest."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": spread, "low": min(values), "high": max(values)}


def summarise(
    runs: Sequence[dict[str, Any]], titles: Iterable[str], probes: Sequence[str], baseline: str
) -> dict[str, Any]:
    """{method: {probe: summary, "seeds": …, "gain": {probe: summary of the differences to `baseline`, by seed}}}."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        found.setdefault(run["method"], {})[run["seed"]] = run["probes"]
        if "untrained" in run:
            found.setdefault("untrained", {})[run["seed"]] = run["untrained"]
    base, table_rows = found.get(baseline, {}), {}
    for method in (name for name in titles if name in found):
        seeds = found[method]
        row: dict[str, Any] = {p: summary_of([values[p] for values in seeds.values()]) for p in probes}
        paired = sorted(set(seeds) & set(base))
        if paired:
            row["gain"] = {p: summary_of([seeds[s][p] - base[s][p] for s in paired]) for p in probes}
        table_rows[method] = {**row, "seeds": sorted(seeds)}
    return table_rows


def ordering(summary: dict[str, Any], probe_name: str) -> str:
    """The trained methods from worst to best by mean accuracy."""
    rows = [name for name in METHODS if name in summary]
    return " < ".join(sorted(rows, key=lambda name: summary[name][probe_name]["mean"]))


def markdown(result: dict[str, Any]) -> str:
    """The tables, as they stand in `results/`."""
    summary, settings = result["summary"], result["settings"]

    def cell(figure: dict[str, float], sign: str = "") -> str:
        return f"{figure['mean']:{sign}.2f} ± {figure['std']:.2f}"

    def paper(method: str, column: int) -> str:
        value = PAPER.get(method, (None, None, None))[column]
        return "" if value is None else f"{value:.2f}"

    probes = probes_of(settings)
    ours = [HEADS[p] for p in probes]
    heads = ("method", "seeds", *ours, "paper: k-NN", "linear", "fine-tune")
    rows = [
        [TITLES[m], str(len(row["seeds"])), *(cell(row[p]) for p in probes), paper(m, 2), paper(m, 1), paper(m, 0)]
        for m, row in summary.items()
    ]
    gains = [
        [TITLES[m], *(cell(row["gain"][p], "+") for p in probes)]
        for m, row in summary.items()
        if "gain" in row and m not in (BASELINE, "untrained")
    ]
    updates = settings["epochs"] * settings["steps_per_epoch"]
    parts = [
        "# Masks compared on Fashion-MNIST",
        f"Top-1 in percent, mean ± standard deviation over seeds; {updates:,} updates of {settings['batch_size']}, "
        f"the demo's nano ViT; {settings['bank']:,} labelled training images, all test images.{tuning(settings)} "
        f"The papers' figures are of ViT-B/16 on ImageNet-1K, 200 epochs.",
        table(heads, rows),
        f"Differences to {TITLES[BASELINE]}, seed by seed:",
        table(("method", *ours), gains),
        f"Paper's ordering: {ordering_of_paper()} (fine-tune).",
        "\n".join(f"- {p}: {ordering(summary, p)}" for p in probes),
    ]
    return "\n\n".join(parts) + "\n"


def tuning(settings: dict[str, Any]) -> str:
    """How the fine-tune column was made, a sentence; empty without that column."""
    if not settings.get(FINETUNE):
        return ""
    return (
        f" Fine-tune: {settings[FINETUNE]} epochs of these labelled images, batch {evidence_finetune.BATCH}, lr "
        f"{evidence_finetune.LR:g}; the untrained encoder's is from scratch."
    )


def ordering_of_paper() -> str:
    """METHODS from worst to best by the paper's fine-tuning accuracy."""
    return " < ".join(sorted(PAPER, key=lambda name: PAPER[name][0] or 0.0))


def write_tables(arguments: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    """JSON and Markdown of the runs that are there, each replaced as a whole."""
    settings = {**settings_of(arguments), FINETUNE: arguments.finetune}
    result = {
        "settings": settings,
        "machine": machine(),
        "data": file_hash(arguments.data / "train.beton"),
        "summary": summarise(runs, TITLES, probes_of(settings), BASELINE),
        "runs": list(runs),
    }
    write_both(arguments.output, result, markdown(result))


def write_both(path: Path, result: dict[str, Any], text: str) -> None:
    """The JSON `path` and the Markdown beside it, each replaced as a whole."""
    write_json(path, result)
    write_text(path.with_suffix(".md"), text)


def start(
    arguments: argparse.Namespace, argv: Sequence[str], method: str, seed: int, module: str = "bench.evidence"
) -> None:
    """Run one cell in a process of its own, its output in RUN/log.txt. **Raises:** `UserError` if it fails."""
    out = folder_of(arguments, method, seed)
    out.mkdir(parents=True, exist_ok=True)
    threads = str(arguments.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", module, *argv, "--one", f"{method}:{seed}"]
    with (out / "log.txt").open("ab") as log:
        status = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
    if status:
        last = [line for line in (out / "log.txt").read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise UserError(f"{method}, seed {seed} failed with status {status} ({' '.join(last)}); see {out / 'log.txt'}")


def ran_one(arguments: argparse.Namespace, run_one: Callable[[argparse.Namespace, str, int, Path], None]) -> bool:
    """Whether this process was started for one cell, --one METHOD:SEED, which `run_one` has then run."""
    if not arguments.one:
        return False
    method, _, seed = arguments.one.partition(":")
    run_one(arguments, method, int(seed), folder_of(arguments, method, int(seed)))
    return True


def require_positive(arguments: argparse.Namespace, names: Iterable[str]) -> None:
    """**Raises:** `UserError` if one of these numbers is below 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} is {getattr(arguments, name)}, expected 1 or more")


def folder_of(arguments: argparse.Namespace, method: str, seed: int) -> Path:
    """Where one cell's run lives."""
    return Path(arguments.work) / f"{method}-seed{seed}"


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="bench.evidence", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/fashion_mnist"), help="has train.beton and val.beton")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="where the runs are kept")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--epochs", type=int, default=20, help="of steps_per_epoch updates each")
    parser.add_argument("--steps_per_epoch", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--bank", type=int, default=10000, help="labelled training images of the probes")
    parser.add_argument("--extra", default="", help="further flags of every run, as one string")
    parser.add_argument("--finetune", type=int, default=0, help="epochs of fine-tuning each run; 0 = no such column")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in a run")
    parser.add_argument("--deepspeed_config", default=fast_config())
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # METHOD:SEED, in the process started for it
    parser.add_argument("-o", "--output", type=json_file, default=Path("bench/results/evidence_images.json"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.evidence`."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(given)
    if ran_one(arguments, run_one):
        return
    require_positive(arguments, ("seeds", "epochs", "steps_per_epoch", "batch_size", "bank", "threads"))
    if arguments.finetune < 0:
        raise UserError(f"finetune is {arguments.finetune}, expected a number of epochs, or 0")
    for split in ("train", "val"):
        if not (arguments.data / f"{split}.beton").is_file():
            raise UserError(f"{arguments.data} has no {split}.beton; make it with python -m data_prep.fashion_mnist")
    fill_table(
        arguments,
        settings_of(arguments),
        start_one=lambda method, seed: start(arguments, given, method, seed),
        write=lambda runs: write_tables(arguments, runs),
        complete=lambda out, result: with_finetune(arguments, out, result) if arguments.finetune else result,
    )


if __name__ == "__main__":
    run_command(main)
