"""`report.md` and `curves.png` of a fine-tuning, a segmentation or a detection, from what it wrote."""

from pathlib import Path
from typing import Any

from fasthpm import files
from fasthpm.checkpoint.folder import TUNED
from fasthpm.pictures.written import read_figures, read_object

SPEED = ("images_per_second", "data_wait", "seconds")
NO_FIGURES = {"step", "epoch", "time", "lr", "bad_samples", *SPEED}
PICTURE = "pictures.png"


def kind_of(folder: Path) -> str:
    """The command that wrote a folder ("finetune", "segment", "detect"), empty if none of them did."""
    return next((Path(name).stem for name in TUNED if (folder / name).is_file()), "")


def write(folder: Path) -> Path:
    """Write FOLDER/report.md and FOLDER/curves.png. **Returns:** the report's path.

    **Raises:** `UserError` if nothing was logged yet, what was written is damaged, or the disk does not take them.
    """
    records = read_figures(folder)
    path, parts = folder / "report.md", sections(folder, records)
    with files.writing(path, "make room and try again"):
        with files.replacing(folder / "curves.png") as aside:
            draw_curves(records, aside)
        files.write_text(path, "\n".join(section for section in parts if section))
    return path


def sections(folder: Path, records: list[dict[str, Any]]) -> list[str]:
    """What the report says, part by part."""
    last, result, kept = records[-1], folder / "result.md", folder / "result.json"
    made = read_object(kept, {"run": str, "recipe": str}) if kept.is_file() else {}
    what = made.get("protocol") or f"{kind_of(folder)}, not finished: update {last['step']:.0f}"
    head = f"# {what}\n\nOf {made['run']}, recipe {made['recipe']}.\n" if made else f"# {what}\n"
    names = [name for name in last if name not in ("step", "epoch", "time")]
    rows = "\n".join(f"| {name} | {cell(records[0], name)} | {cell(last, name)} |" for name in names)
    figures = f"| | update {records[0]['step']:.0f} | update {last['step']:.0f} |\n|---|---|---|\n{rows}\n"
    picture = f"![images, truth and prediction]({PICTURE})\n" if (folder / PICTURE).is_file() else ""
    return [
        head,
        f"## Result\n\n{result.read_text()}" if result.is_file() else "",
        f"## Figures\n\n{figures}",
        "![curves](curves.png)\n",
        picture,
    ]


def cell(record: dict[str, Any], name: str) -> str:
    """A figure, empty where the record lacks it."""
    return f"{record[name]:.4g}" if name in record else ""


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Losses, what tests found, learning rate and speed, each against updates."""
    from matplotlib.figure import Figure

    known = list(dict.fromkeys(name for record in records for name in record if name not in NO_FIGURES))
    losses = [name for name in known if "loss" in name]
    tested = [name for name in known if name not in losses]
    groups = (("losses", losses), ("tests, percent", tested), ("learning rate", ["lr"]), ("speed", list(SPEED[:2])))
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, groups, strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 10 else "")
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        if len(names) > 1 and axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100, format="png")
