"""`report.md` and `curves.png` of a run, from what the run wrote; of several runs, a comparison.

fasthpm report RUN                        # or RUN/finetune, RUN/segment, RUN/detect
fasthpm report RUN RUN … [-o FOLDER]      # comparison.md, comparison.png: accuracy against epochs and GPU-hours
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasthpm import files
from fasthpm.cli import Parser
from fasthpm.errors import UserError
from fasthpm.pictures import tunings
from fasthpm.pictures.written import VERSIONS, read_figures, read_knn, read_object
from fasthpm.recipe import Recipe, load_recipe
from fasthpm.run.records import latest

EPOCHS = "effective_epochs"  # older results lack it
KNN_ORDER = ("bank_size", "pool", "weights")
CURVES = (
    ("loss", ("reconstruction_loss", "cls_loss", "patch_loss", "difficulty_loss")),
    ("collapse", ("teacher_entropy", "mean_entropy", "teacher_kl")),
    ("rankme", ("rankme",)),
    ("predictor health", ("spearman", "pair_accuracy", "teacher_spearman", "difficulty_spearman")),
    ("images per second", ("images_per_second",)),
    ("learning rate", ("lr",)),
    ("schedules", ("alpha", "ema_momentum")),
    ("percent", ("data_wait_percent", "teacher_percent", "mfu_percent")),
)
TABLE = (
    "loss",
    "reconstruction_loss",
    "cls_loss",
    "patch_loss",
    "difficulty_loss",
    "teacher_entropy",
    "mean_entropy",
    "teacher_kl",
    "rankme",
    "spearman",
    "pair_accuracy",
    "teacher_spearman",
    "difficulty_spearman",
    "difficulty_auc",
    "grad_norm",
    "images_per_second",
    "data_wait_percent",
    "teacher_percent",
    "mfu_percent",
    "memory_gib",
)
EXPLAINED = {
    "teacher_entropy": "teacher_entropy is of the teacher's distribution of a view, mean_entropy of their mean, in "
    "nats: both near 0, or both near the logarithm of the prototypes, is a collapse",
    "teacher_kl": "teacher_kl is what the student's distribution lacks of it",
    "rankme": "rankme is how many directions the features of a batch use: 1 is a collapse",
    "spearman": "spearman and pair_accuracy compare the student's predicted with its real loss of the masked patches",
    "teacher_spearman": "teacher_spearman compares the difficulty that makes the masks with the same real loss",
    "difficulty_spearman": "difficulty_spearman compares it with the mean loss over random masks of held-out samples",
    "difficulty_auc": "difficulty_auc is the chance that it ranks a patch of the hardest quarter above another",
    "mfu_percent": "MFU is what the method needs, teacher included, over the matmul rate of this machine",
}


def write(run: Path) -> Path:
    """Write RUN/report.md and RUN/curves.png. **Returns:** the report's path.

    **Raises:** `UserError` if what the run wrote is damaged, or the disk does not take them.
    """
    records = read_figures(run)
    if not (run / "versions.json").is_file():
        raise UserError(f"{run} has metrics and no versions.json: it is no output_dir of a run; give one")
    panels = sorted((run / "panels").glob("*.png"))
    sections = [_head(run, records), _figures(records), _probes(run), "## Curves\n\n![curves](curves.png)\n"]
    if panels:
        sections.append(f"## What the model sees\n\n![panel](panels/{panels[-1].name})\n")
    path = run / "report.md"
    with files.writing(path, "make room and try again"):
        with files.replacing(run / "curves.png") as aside:
            draw_curves(records, aside)
        files.write_text(path, "\n".join(section for section in sections if section))
    return path


def draw_curves(records: list[dict[str, float]], path: Path) -> None:
    """One small plot per group in `CURVES`, against epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    shown = [(title, names) for title, names in CURVES if title != "collapse" or any(names[0] in r for r in records)]
    axes = figure.subplots(2, -(-len(shown) // 2))
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, shown, strict=False):
        for name in names:
            points = [(record["epoch"], record[name]) for record in records if name in record]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 10 else "")
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if len(names) > 1 and axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100, format="png")


def _head(run: Path, records: list[dict[str, float]]) -> str:
    recipe = load_recipe(run / "recipe.json")
    versions = read_object(run / "versions.json", VERSIONS)
    last = records[-1]
    return (
        f"# {recipe.recipe}\n\n"
        f"{recipe.model}, {recipe.input_size} px, patch {recipe.patch_size}, mask {recipe.mask_policy} "
        f"{recipe.mask_ratio:.0%}, predict_loss {recipe.predict_loss}; global batch {recipe.global_batch_size}, "
        f"lr {recipe.lr:.2e}; update {last['step']:.0f} of {recipe.total_steps} (epoch {last['epoch']:.2f}).\n\n"
        f"Difficulty: {difficulty_line(recipe, records)}.\n\n"
        f"Data {recipe.data_path}; {versions['world_size']} x {versions['device']}; torch {versions['torch']}, "
        f"deepspeed {versions['deepspeed']}, fasthpm {versions['fasthpm']} ({versions['commit'][:12]}).\n"
    )


def difficulty_line(recipe: Recipe, records: list[dict[str, float]]) -> str:
    """How the run asks what is hard, and how true that was in the end."""
    if not recipe.answers_difficulty:
        return "none, for nobody learns it"
    found = latest(records, "difficulty_spearman")
    if not found:
        return f"{recipe.question.name}; difficulty_spearman not measured"
    return (
        f"{recipe.question.name}; difficulty_spearman {found['difficulty_spearman']:.3f}, difficulty_auc "
        f"{found['difficulty_auc']:.3f} at update {found['step']:.0f}"
    )


def _figures(records: list[dict[str, float]]) -> str:
    first, last = records[0], records[-1]
    known = [name for name in TABLE if any(name in record for record in records)]
    rows = "\n".join(f"| {name} | {_cell(first, name)} | {_cell(last, name)} |" for name in known)
    return (
        f"## Figures\n\n| | update {first['step']:.0f} | update {last['step']:.0f} |\n|---|---|---|\n{rows}\n\n"
        f"{'; '.join(words for name, words in EXPLAINED.items() if name in known)}.\n"
    )


def _cell(record: dict[str, float], name: str) -> str:
    """A figure, empty where the record lacks it."""
    return f"{record[name]:.4g}" if name in record else ""


def _probes(run: Path) -> str:
    results: list[dict[str, Any]] = [read_knn(path) for path in sorted(run.glob("knn_*.json"))]
    if not results:
        return ""
    results.sort(key=lambda result: (*(result[name] for name in KNN_ORDER), result.get(EPOCHS, 0)))
    neighbours = list(results[0]["accuracy"])
    head = " | ".join(f"k = {k}" for k in neighbours)
    rows = "\n".join(_probe_row(result, neighbours) for result in results)
    table = f"| voters | weights | epochs | pool | {head} |\n|---|---|---|---|{'---|' * len(neighbours)}\n{rows}\n"
    return f"## k-NN top-1, percent\n\n{table}" + _gains(results)


def _voters(result: dict[str, Any]) -> str:
    return f"{result['bank_size']:,}" if result["bank_size"] else "all"


def _probe_row(result: dict[str, Any], neighbours: list[str]) -> str:
    figures = " | ".join(f"{result['accuracy'].get(k, float('nan')):.2f}" for k in neighbours)
    epochs = f"{result[EPOCHS]:.4g}" if EPOCHS in result else ""
    return f"| {_voters(result)} | {result['weights']} | {epochs} | {result['pool']} | {figures} |"


def _gains(results: list[dict[str, Any]]) -> str:
    """Best accuracy of the student over that of the untrained encoder, wherever both were probed alike.

    `results` are sorted by epochs: of several checkpoints the last counts.
    """
    best: dict[tuple[str, str], dict[str, float]] = {}
    for result in results:
        best.setdefault((_voters(result), result["pool"]), {})[result["weights"]] = max(result["accuracy"].values())
    return "".join(
        f"\nPretraining gains {found['student'] - found['untrained']:+.2f} points over the untrained encoder with "
        f"{voters} labelled training images voting ({pool}, best k of each).\n"
        for (voters, pool), found in best.items()
        if {"student", "untrained"} <= found.keys()
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`fasthpm report`."""
    parser = Parser(prog="fasthpm report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run; several are compared")
    parser.add_argument("-o", "--output", type=Path, help="folder for a comparison (default: here)")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) > 1:
        from fasthpm.pictures import comparison

        path = comparison.write(arguments.runs, arguments.output or Path())
        print(f"{path.read_text()}\nwritten to {path} and {path.with_suffix('.png')}")
        return
    run = arguments.runs[0]
    if arguments.output is not None:
        raise UserError(
            f"output is {arguments.output}, and the report of one run is kept in the run, as {run / 'report.md'}; "
            f"leave -o out, or name several runs to compare"
        )
    if tunings.kind_of(run):
        tunings.write(run)
    else:
        write(run)
    print((run / "report.md").read_text())
    print(f"written to {run / 'report.md'} and {run / 'curves.png'}")
