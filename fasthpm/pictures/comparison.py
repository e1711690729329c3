"""Several runs side by side, as `fasthpm report A B …` writes them: accuracies against epochs and GPU-hours, losses.

Reads what runs left (recipe.json, metrics.jsonl) and every evaluation beside them: knn_*.json and *result*.json, dicts
with at least "accuracy" (a number, or {k: number}); whatever else is missing stays empty. Two evaluations are in one
column if they had the same protocol, to the last word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasthpm import files
from fasthpm.errors import UserError, warn
from fasthpm.pictures import tunings
from fasthpm.pictures.written import read_figures, read_object
from fasthpm.recipe import Recipe, load_recipe
from fasthpm.run.records import gpu_hours, latest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES = ("reconstruction_loss", "loss")  # the first that a run has is drawn
AGREEMENT = ("teacher_spearman", "difficulty_spearman", "difficulty_auc")


@dataclass(frozen=True)
class RunSummary:
    """What is known of one run."""

    name: str
    recipe: Recipe
    records: list[dict[str, float]]
    gpu_hours: list[float]  # pretraining, up to each record; pauses do not count
    results: dict[str, float]  # {evaluation: best top-1, percent}

    @property
    def epochs(self) -> float:
        """Pretrained so far."""
        return self.records[-1]["epoch"]


def read_run(run: Path) -> RunSummary:
    """**Raises:** `UserError` if `run` is no output_dir of a run that has logged something, or is damaged."""
    if kind := tunings.kind_of(run):
        raise UserError(
            f"{run} is what fasthpm {kind} wrote, and runs of pretraining are compared; give the run that it came "
            f"from, in whose row its result stands if it lies there, or report it alone"
        )
    records, recipe, versions = read_figures(run), load_recipe(run / "recipe.json"), run / "versions.json"
    world_size = read_object(versions, {"world_size": int})["world_size"] if versions.is_file() else 1
    name = run.name or run.resolve().name
    hours = gpu_hours(records, recipe.global_batch_size, int(world_size))
    return RunSummary(name, recipe, records, hours, read_results(run))


def read_results(run: Path) -> dict[str, float]:
    """{evaluation: top-1 in percent} of the evaluations in `run` and in its folders; of several k the best.

    Those that share a protocol have their files' names, too.
    """
    found: dict[str, dict[Path, float]] = {}
    patterns = [folder + name for folder in ("", "*/") for name in ("*result*.json", "knn_*.json")]
    for path in sorted({path for pattern in patterns for path in run.glob(pattern)}):
        result = files.read_json(path)
        if not result:
            warn(f"{path} is damaged or empty, and left out of the comparison")
        accuracy = result.get("accuracy")
        values = accuracy.values() if isinstance(accuracy, dict) else [accuracy]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if numbers:
            found.setdefault(label_of(result, path), {})[path.relative_to(run)] = max(numbers)
    return {
        label if len(scores) == 1 else f"{label} ({path})": score
        for label, scores in found.items()
        for path, score in scores.items()
    }


def label_of(result: dict[str, Any], path: Path) -> str:
    """The name of an evaluation: its whole protocol, and what else tells it from others of the same protocol."""
    protocol, size = str(result.get("protocol") or path.stem), result.get("bank_size")
    voters = f"{size:,} voters" if size and isinstance(size, int) else ""
    return ", ".join(str(part) for part in (protocol, result.get("weights"), result.get("pool"), voters) if part)


def markdown(runs: Sequence[RunSummary]) -> str:
    """One row per run."""
    evaluations = list(dict.fromkeys(name for run in runs for name in run.results))
    heads = ["run", "recipe", "mask", "epochs", "GPU-hours", "reconstruction loss", "difficulty", *AGREEMENT]
    heads += evaluations
    rows = [" | ".join(heads), "|".join(["---"] * len(heads)), *(" | ".join(row_of(run, evaluations)) for run in runs)]
    table = "\n".join(f"| {row} |" for row in rows)
    return (
        f"# {len(runs)} runs\n\n{table}\n\nGPU-hours are of pretraining, from the logged rates; accuracies are top-1 "
        f"in percent, of several k the best. Losses compare only between runs with the same target. "
        f"difficulty_spearman compares what a run asks with the mean loss over random masks, difficulty_auc with its "
        f"hardest quarter; teacher_spearman with the losses of the patches that it had masked.\n\n"
        f"![curves](comparison.png)\n"
    )


def row_of(run: RunSummary, evaluations: Sequence[str]) -> list[str]:
    """The cells of one run."""
    last = run.records[-1]
    agreement = [latest(run.records, name).get(name) for name in AGREEMENT]
    figures = ["" if value is None else f"{value:.4g}" for value in (last.get("reconstruction_loss"), *agreement)]
    figures.insert(1, run.recipe.question.name if run.recipe.answers_difficulty else "")
    scores = [f"{run.results[name]:.2f}" if name in run.results else "" for name in evaluations]
    mask = f"{run.recipe.mask_policy} {run.recipe.mask_ratio:.0%}"
    return [run.name, run.recipe.recipe, mask, f"{run.epochs:.2f}", f"{run.gpu_hours[-1]:.3g}", *figures, *scores]


def draw(runs: Sequence[RunSummary]) -> "Figure":
    """Losses and accuracies, against epochs (left) and GPU-hours (right).

    Runs that reconstruct nothing show the loss that they have.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, unit in enumerate(("epochs", "GPU-hours")):
        loss, accuracy = axes[0][column], axes[1][column]
        for number, run in enumerate(runs):
            places = [record["epoch"] for record in run.records] if unit == "epochs" else run.gpu_hours
            name = next((name for name in LOSSES if any(name in record for record in run.records)), "")
            pairs = zip(places, run.records, strict=True)
            if points := [(place, record[name]) for place, record in pairs if name in record]:
                label = run.name if name == LOSSES[0] else f"{run.name}: {name}"
                loss.plot(*zip(*points, strict=True), label=label, color=f"C{number}", linewidth=1.2)
            for marker, (name, value) in zip("osD^v<>pP*X" * len(run.results), run.results.items(), strict=False):
                accuracy.scatter(places[-1], value, color=f"C{number}", marker=marker, label=f"{run.name}: {name}")
        for axis, what in ((loss, "reconstruction loss"), (accuracy, "top-1, percent")):
            axis.set_xlabel(unit)
            axis.set_ylabel(what)
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=6)
    return figure


def write(folders: Sequence[Path], output: Path) -> Path:
    """Write comparison.md and comparison.png into `output`. **Returns:** the path of the former.

    **Raises:** `UserError` for a folder that is no run of pretraining, for damaged files, and if the disk refuses.
    """
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):  # runs of the same name in different folders
        runs = [
            RunSummary(str(f), r.recipe, r.records, r.gpu_hours, r.results) for f, r in zip(folders, runs, strict=True)
        ]
    figure, text = draw(runs), markdown(runs)  # all of it before the first file
    with files.writing(output, "choose another -o"):
        output.mkdir(parents=True, exist_ok=True)
        with files.replacing(output / "comparison.png") as aside:
            figure.savefig(aside, dpi=100, format="png")
        files.write_text(output / "comparison.md", text)
    return output / "comparison.md"
