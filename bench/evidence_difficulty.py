"""Do truly hard masks help? Ways to ask what is hard, each beside random masks in the same architecture.

    python -m bench.evidence_difficulty --set fashion --data data/fashion_mnist --work runs/difficulty
        [--length short] [--seeds 5] [--methods …] [--finetune 2] [-o bench/results/difficulty_fashion_short.json]

Sets: `fashion` (Fashion-MNIST), `scenes` (python -m data_prep.scenes, prepared beside it: garments on photographs, in
which hard and easy patches mean something), `video` (python -m data_prep.moving_fashion). Lengths: `short`, 640
updates of 32; `long`, 3,200 of 64. One process per run, through the public training path; seeds take turns with
methods, finished runs are kept, interrupted ones resume, and the tables are rewritten after every run.

Of every run: `difficulty_spearman` and the AUC of the hardest quarter at its end (true difficulty: the mean loss over
12 random masks of 64 held-out samples), on scenes also how well the map finds the object (AUC against its mask); k-NN
and logistic regression on the mean of the patch tokens, on scenes on every patch token: is most of it the object? (50 =
chance); with --finetune N, top-1 after N epochs of `fasthpm finetune` on the images of the k-NN (of runs whose weights
are still there). Differences are taken seed by seed: to the method's own control, which has random masks and the same
architecture (of clips with as many masked patches in every slot as HPM has, `*_slots`; `mask_policy random` draws them
over the whole clip), and to MAE given the same compute.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench import evidence_finetune
from bench.common import fast_config, json_file, machine, table, write_json
from bench.difficulty_rows import CONTROLS, KEPT, LENGTHS, METHODS, PAPER, SETS, SLOTS
from bench.evidence import (
    FINETUNE,
    RESULT,
    fill_table,
    finished,
    flag,
    folder_of,
    linear_accuracy,
    ran_one,
    require_positive,
    start,
    train,
    with_finetune,
    write_both,
)
from fasthpm import recipes
from fasthpm.checkpoint.weights import load_weights
from fasthpm.cli import Parser, run_command
from fasthpm.data import build_loader
from fasthpm.data.names import sample_names
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError
from fasthpm.model import HPMViT
from fasthpm.patches import patches_for
from fasthpm.pictures.saliency import Saliency
from fasthpm.probes import knn
from fasthpm.recipe import Recipe
from fasthpm.speed.flops import cost_over_mae

LAST = ("step", "reconstruction_loss", "teacher_spearman", "spearman")
SETTINGS = ("set", "length", "bank", "extra")
PROBES = ("knn", "linear", FINETUNE)
TRUTH = ("difficulty_spearman", "difficulty_auc")
ENCODE_BATCH, SALIENCY_IMAGES = 250, 500


# ------------------------------------------------------------------------------------------------------ one run
def fields_of(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """The recipe's fields for a row of the table."""
    chosen, row, (epochs, steps, batch) = SETS[arguments.set], METHODS[method], LENGTHS[arguments.length]
    fields = {
        **chosen.fields,
        "epochs": epochs,
        "steps_per_epoch": steps,
        "batch_size": batch,
        "global_batch_size": batch,
        "ema_ramp_epochs": epochs,
        "warmup_epochs": 0.05 * epochs,
        "difficulty_every": steps * epochs // 4,
        **PAPER,
        **row.fields,
    }
    if row.fields.get("predict_loss") == "none":
        fields["model"] = chosen.plain
    if row.kept and chosen.maps:
        fields |= KEPT
    if method == "mae_same_cost":
        wanted = dataclasses.replace(recipes.from_name(chosen.recipe), **typed(fields_of(arguments, "measured")))
        fields["steps_per_epoch"] = round(steps * cost_over_mae(wanted))
    return fields


def typed(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as a `Recipe` has them."""
    return {**fields, **({"input_size": str(fields["input_size"])} if "input_size" in fields else {})}


def control_of(name: str, method: str) -> str:
    """The row with random masks that a row of a set is compared with; empty where there is none."""
    control = METHODS[method].control
    slots = SETS[name].slots and method not in (*CONTROLS, *SLOTS)
    return f"{control}_slots" if slots and f"{control}_slots" in SLOTS else control


def train_flags(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> list[str]:
    """`fasthpm pretrain`'s command line for one cell of the table."""
    chosen = SETS[arguments.set]
    where = {
        "data_path": arguments.data / chosen.paths[0],
        "val_path": arguments.data / chosen.paths[1],
        "output_dir": out,
        "seed": seed,
        "num_workers": 1,
        "deepspeed_config": arguments.deepspeed_config,
        "save_every": LENGTHS[arguments.length][0],
        "panel_every": 0,
    }
    pairs = {**where, **fields_of(arguments, method)}
    flags = [part for name, value in pairs.items() for part in flag(name, value)]
    return ["--recipe", chosen.recipe, *flags, *arguments.extra.split()]


def run_one(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> None:
    """Train and probe one cell in this process, and write its figures to OUT/evidence.json last of all."""
    taken, last = train(train_flags(arguments, method, seed, out), fields_of(arguments, method), out)
    model, recipe = load_weights(out, "teacher" if METHODS[method].fields.get("mask_policy") != "random" else "student")
    result = {
        "method": method,
        "seed": seed,
        "settings": settings_of(arguments),
        "probes": probe(arguments, out),
        "truth": {name: last[name] for name in TRUTH if name in last},
        "saliency": saliency(model, recipe, arguments),
        **taken,
        "last": {name: last[name] for name in LAST if name in last},
    }
    write_json(out / RESULT, result)


def probe(arguments: argparse.Namespace, out: Path, weights: str = "student") -> dict[str, float]:
    """Every accuracy of `PROBES`, in percent: the first --bank training samples, or patches, vote or train.

    - `weights`: whose, of sets without object masks
    """
    train, val = (arguments.data / path for path in SETS[arguments.set].paths)
    if SETS[arguments.set].masks:
        bank, bank_labels = balanced(*encode_patches(arguments, out, "train", arguments.bank))
        queries, labels = balanced(*encode_patches(arguments, out, "val", arguments.bank))
    else:
        bank, bank_labels = encode(out, train, arguments.bank, weights)
        queries, labels = encode(out, val, 0, weights)
    classes = int(bank_labels.max()) + 1
    rows = [F.normalize(side, dim=1) for side in (bank, queries)]
    votes = knn.knn_accuracy(rows[0], bank_labels, rows[1], labels, classes)
    return {"knn": max(votes.values()), "linear": linear_accuracy(bank, bank_labels, queries, labels)}


def balanced(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As many rows [N, D] of every class as of the rarest, the first ones; and their labels."""
    places = [(labels == number).nonzero()[:, 0] for number in labels.unique().tolist()]
    kept = torch.cat([place[: min(map(len, places))] for place in places])
    return rows[kept], labels[kept]


@torch.no_grad()
def encode_patches(arguments: argparse.Namespace, out: Path, split: str, images: int) -> tuple[Tensor, Tensor]:
    """The student's patch tokens, float32 [N, D], of the first `images` images, and whether they are of the object
    (1) or not (0): int64 [N]."""
    model, recipe = load_weights(out, "student")
    path = arguments.data / SETS[arguments.set].paths[split == "val"]
    loader = build_loader(path, recipe.loader_options(batch_size=ENCODE_BATCH, train=False, num_workers=1))
    patches_of = patches_for(model, recipe, loader)
    names = sample_names(str(path), loader.info.num_samples)
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for batch in loader:
            rows.append(model.encode(patches_of(batch.images))[:, model.num_prefix_tokens :].flatten(0, 1))
            files = [arguments.data / split / "objects" / Path(names[sample]).name for sample in batch.ids.tolist()]
            labels += [covered(np.asarray(Image.open(file)), recipe.patch_size) for file in files]
            if len(labels) >= images:
                break
    finally:
        loader.close()
    return torch.cat(rows), torch.cat(labels)


def covered(mask: Array, side: int) -> Tensor:
    """Whether an object mask, uint8 [H, W] of 0 and 255, covers most of each patch: int64 [L] of 0 and 1."""
    rows, columns = mask.shape[0] // side, mask.shape[1] // side
    share = mask.reshape(rows, side, columns, side).mean(axis=(1, 3)) / 255
    return torch.from_numpy((share > 0.5).astype(np.int64).ravel())


@torch.no_grad()
def encode(out: Path, path: Path, limit: int, weights: str = "student") -> tuple[Tensor, Tensor]:
    """Mean of the patch tokens, float32 [N, D], of the first `limit` (0 = all) samples, and labels [N]."""
    model, recipe = load_weights(out, weights)
    loader = build_loader(path, recipe.loader_options(batch_size=ENCODE_BATCH, train=False, num_workers=1))
    patches_of = patches_for(model, recipe, loader)
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for batch in loader:
            tokens = model.encode(patches_of(batch.images)).float()
            rows.append(tokens[:, model.num_prefix_tokens :].mean(dim=1))
            labels.append(batch.labels)
            if limit and sum(map(len, labels)) >= limit:
                break
    finally:
        loader.close()
    return torch.cat(rows)[: limit or None], torch.cat(labels)[: limit or None]


@torch.no_grad()
def saliency(model: HPMViT, recipe: Recipe, arguments: argparse.Namespace) -> float | None:
    """Mean AUC of the difficulty against the object masks of held-out images; None where there are none of either."""
    chosen = SETS[arguments.set]
    if not chosen.masks or not recipe.answers_difficulty:
        return None
    path = arguments.data / chosen.paths[1]
    loader = build_loader(path, recipe.loader_options(batch_size=ENCODE_BATCH, train=False, num_workers=1))
    patches_of = patches_for(model, recipe, loader)
    names = sample_names(str(path), loader.info.num_samples)
    scores = Saliency(arguments.data / "val" / "objects", recipe.image_size, names)
    seen = 0
    try:
        for batch in loader:
            maps = model.predict_loss(patches_of(batch.images)).reshape(-1, *recipe.grid_size).numpy()
            for sample, values in zip(batch.ids.tolist(), maps, strict=True):
                scores.add(names[sample], {"predicted": values})
            seen += len(maps)
            if seen >= SALIENCY_IMAGES:
                break
    finally:
        loader.close()
    return scores.scores()["predicted"]["auc"]


# ------------------------------------------------------------------------------------------------------ the table
def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every run of a table shares."""
    return {name: getattr(arguments, name) for name in SETTINGS}


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation over seeds (0 of one seed), lowest and highest, and how many are above 0."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    won = sum(value > 0 for value in values)
    return {"mean": statistics.fmean(values), "std": spread, "low": min(values), "high": max(values), "won": won}


def summarise(runs: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Of the runs of the set `name`: {method: {"seeds", probe or truth: summary, "gain" and "gain_same_cost": {probe:
    summary of differences}}}."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["method"], {})[run["seed"]] = run
    rows: dict[str, Any] = {}
    for method in (one for one in METHODS if one in found):
        seeds = found[method]
        row: dict[str, Any] = {"seeds": sorted(seeds)}
        for probe_name in PROBES:
            values = [run["probes"][probe_name] for run in seeds.values() if probe_name in run["probes"]]
            row |= {probe_name: mean_and_spread(values)} if values else {}
        for truth in TRUTH:
            values = [run["truth"][truth] for run in seeds.values() if truth in run["truth"]]
            row |= {truth: mean_and_spread(values)} if values else {}
        areas = [run["saliency"] for run in seeds.values() if run["saliency"] is not None]
        row |= {"saliency": mean_and_spread(areas)} if areas else {}
        for title, other in (("gain", control_of(name, method)), ("gain_same_cost", "mae_same_cost")):
            row |= {title: differences(seeds, found[other])} if other in found and other != method else {}
        rows[method] = row
    return rows


def differences(seeds: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """{probe: summary of the differences, seed by seed}."""
    pairs = [(run["probes"], others[seed]["probes"]) for seed, run in sorted(seeds.items()) if seed in others]
    made = {p: [one[p] - other[p] for one, other in pairs if p in one and p in other] for p in PROBES}
    return {probe_name: mean_and_spread(values) for probe_name, values in made.items() if values}


def markdown(result: dict[str, Any]) -> str:
    """The table, as it stands in `results/`."""
    settings, summary = result["settings"], result["summary"]
    epochs, steps, batch = LENGTHS[settings["length"]]
    tuned = any(FINETUNE in row for row in summary.values())
    rows = [[METHODS[method].title, str(len(row["seeds"])), *_cells(row, tuned)] for method, row in summary.items()]
    heads = ("masks", "seeds", "difficulty_spearman (lowest)", "AUC hardest quarter", "AUC object", "k-NN", "linear")
    gains = ["k-NN, less own control", "linear, less own control", "k-NN, less MAE at the cost of `measured`"]
    if tuned:
        gains += ["fine-tune", "fine-tune, less own control"]
    about = (
        f"Set `{settings['set']}`, {epochs * steps:,} updates of {batch}, the demo's nano ViT; α 0 → 0.5 where nothing "
        f"is said. Accuracies in percent, mean ± standard deviation over seeds; differences seed by seed, in brackets "
        f"how many seeds are ahead. Controls have random masks and the same architecture."
    )
    if tuned and settings.get(FINETUNE):
        about += f" Fine-tune: {settings[FINETUNE]} epochs of {settings['bank']:,} labelled images."
    return "\n\n".join(["# Ways to ask what is hard", about, table((*heads, *gains), rows)]) + "\n"


def _cells(row: dict[str, Any], tuned: bool) -> list[str]:
    def text(figure: dict[str, float] | None, digits: int, low: bool = False) -> str:
        if figure is None:
            return ""
        tail = f" ({figure['low']:.{digits}f})" if low else f" ± {figure['std']:.{digits}f}"
        return f"{figure['mean']:.{digits}f}{tail}"

    def gain(figures: dict[str, Any] | None, name: str) -> str:
        if not figures or name not in figures:
            return ""
        figure = figures[name]
        return f"{figure['mean']:+.2f} ± {figure['std']:.2f} ({figure['won']})"

    further = [text(row.get(FINETUNE), 2), gain(row.get("gain"), FINETUNE)] if tuned else []
    return [
        text(row.get("difficulty_spearman"), 2, low=True),
        text(row.get("difficulty_auc"), 2),
        text(row.get("saliency"), 2),
        text(row["knn"], 2),
        text(row["linear"], 2),
        gain(row.get("gain"), "knn"),
        gain(row.get("gain"), "linear"),
        gain(row.get("gain_same_cost"), "knn"),
        *further,
    ]


def finished_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of the table that are there. **Raises:** `UserError` if there are none, or some have other settings."""
    cells = [(method, seed) for seed in range(arguments.seeds) for method in arguments.methods]
    folders = [folder_of(arguments, method, seed) for method, seed in cells]
    found = [(out, finished(settings_of(arguments), out)) for out in folders]
    runs = [tuned_where_done(arguments, out, run) for out, run in found if run is not None]
    if not runs:
        raise UserError(f"{arguments.work} has no finished run of these methods; leave out --finished to make them")
    return runs


def write_tables(arguments: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    """JSON and Markdown of the runs that are there, each replaced as a whole."""
    settings, summary = {**settings_of(arguments), FINETUNE: arguments.finetune}, summarise(runs, arguments.set)
    result = {"settings": settings, "machine": machine(), "summary": summary, "runs": list(runs)}
    write_both(arguments.output, result, markdown(result))


def check_finetune(arguments: argparse.Namespace) -> None:
    """**Raises:** `UserError` for a number of epochs below 0, or a set whose samples are not images."""
    if arguments.finetune < 0:
        raise UserError(f"finetune is {arguments.finetune}, expected a number of epochs, or 0")
    if arguments.finetune and arguments.set == "video":
        raise UserError("finetune is of images, and set is video; leave it out")


def tuned_where_kept(arguments: argparse.Namespace, out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the accuracy of fine-tuning, where that is asked for and the run's weights are still there."""
    if not arguments.finetune or not (out / "report.md").is_file():
        return result
    return with_finetune(arguments, out, result, SETS[arguments.set].paths)


def tuned_where_done(arguments: argparse.Namespace, out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the accuracy of fine-tuning, where that is asked for and has been done."""
    subset = evidence_finetune.subset_path(arguments.work, arguments.bank)
    accuracy = evidence_finetune.done(evidence_finetune.place(out, subset, arguments.finetune))
    return result if accuracy is None else {**result, "probes": {**result["probes"], FINETUNE: accuracy}}


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="bench.evidence_difficulty", description=__doc__)
    parser.add_argument("--set", choices=list(SETS), default="fashion", help="what is trained on")
    parser.add_argument("--data", type=Path, default=Path("data/fashion_mnist"), help="where it is")
    parser.add_argument("--work", type=Path, default=Path("runs/difficulty"), help="where the runs are kept")
    parser.add_argument("--length", choices=list(LENGTHS), default="short")
    usual = [name for name in METHODS if not name.endswith("_hardest") and name not in SLOTS]
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=usual)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method")
    parser.add_argument("--bank", type=int, default=10000, help="labelled training samples of the probes")
    parser.add_argument("--finetune", type=int, default=0, help="epochs of fine-tuning each run; 0 = no such column")
    parser.add_argument("--extra", default="", help="further flags of every run, as one string")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in a run")
    parser.add_argument("--deepspeed_config", default=fast_config())
    parser.add_argument(
        "--finished", action="store_true", help="run nothing; write the table of the runs that are there"
    )
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # METHOD:SEED, in the process started for it
    parser.add_argument("-o", "--output", type=json_file, default=None, help="default: bench/results/difficulty_….json")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.evidence_difficulty`."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(given)
    if ran_one(arguments, run_one):
        return
    require_positive(arguments, ("seeds", "bank", "threads"))
    check_finetune(arguments)
    for path in SETS[arguments.set].paths:
        if not (arguments.data / path).exists():
            raise UserError(f"{arguments.data} has no {path}; see the sets in --help for how to make it")
    if arguments.output is None:
        arguments.output = Path(f"bench/results/difficulty_{arguments.set}_{arguments.length}.json")
    if arguments.finished:
        write_tables(arguments, finished_runs(arguments))
        return
    fill_table(
        arguments,
        settings_of(arguments),
        start_one=lambda method, seed: start(arguments, given, method, seed, "bench.evidence_difficulty"),
        write=lambda runs: write_tables(arguments, runs),
        complete=lambda out, result: tuned_where_kept(arguments, out, result),
    )


if __name__ == "__main__":
    run_command(main)
