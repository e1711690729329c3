"""One Markdown page and one picture from raw results.

    python -m bench.report bench/results [-o bench/results/report.md]

Every `*.json` of step, roofline, end_to_end, scaling, losses and masking that is found becomes a section; others, and
those of an older form, are named. A speed-up appears only where its baseline was timed in the same run, and beside it
the run's machine and commit.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import end_to_end, losses, masking, roofline, scaling, step
from bench.common import say
from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError
from fasthpm.files import check_place, replacing, write_text, writing

SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "step": step.report,
    "roofline": roofline.report,
    "end_to_end": end_to_end.report,
    "scaling": scaling.report,
    "losses": losses.report,
    "masking": masking.report,
}
TITLES = {
    "step": "Steps",
    "roofline": "Roofline (a model, not a measurement)",
    "end_to_end": "Data and step together",
    "scaling": "Ranks, accumulation, ZeRO stages",
    "losses": "Ranking loss in blocks and over all pairs",
    "masking": "Masks, batched and image by image",
}


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All results by file name. **Raises:** `UserError` if there are none, or one cannot be read."""
    if folder.is_file():
        raise UserError(f"{folder} is a file, expected the folder of raw results that it lies in")
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.name] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); remove it or write it again") from error
    if not found:
        raise UserError(f"{folder} holds no *.json; write some with python -m bench.step -o {folder}/step.json")
    return found


def kind_of(result: Any) -> str:
    """Which bench wrote it; empty for one that has no section here."""
    kind = result.get("bench", "") if isinstance(result, dict) else ""
    return kind if kind in SECTIONS else ""


def drawn_up(results: dict[str, Any]) -> dict[str, str]:
    """The section of every result that has one, by file name; those of an older form, which lack figures, have none."""
    found = {}
    for name, result in results.items():
        if kind := kind_of(result):
            with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):  # of files of any age
                found[name] = SECTIONS[kind](result)
    return found


def origin(result: dict[str, Any]) -> str:
    """Machine, versions and commit, in one line."""
    made = result.get("versions") or result.get("machine") or {}
    names = ("device", "torch", "deepspeed", "python", "commit")
    parts = [f"{name} {made[name]}" for name in names if name in made]
    told = ("size", "frames", "recipe", "batch_size", "threads", "rounds")
    shape = [f"{name} {result[name]}" for name in told if isinstance(result.get(name), str | int)]
    return "; ".join([*shape, *parts])


def page(results: dict[str, dict[str, Any]], sections: dict[str, str], picture: str) -> str:
    """The Markdown. `sections`: of `drawn_up`; `picture`: its name, empty for none."""
    lines = ["# Benchmarks", "", "Median (lowest to highest round). Ratios are of runs that took turns.", ""]
    if picture:
        lines += [f"![Time of a step over that of our MAE]({picture})", ""]
    for kind, title in TITLES.items():
        for name, section in sections.items():
            if kind_of(results[name]) == kind:
                lines += [f"## {title}: {name}", "", origin(results[name]), "", section, ""]
    rest = [name for name in results if name not in sections]
    return "\n".join([*lines, *([f"Raw results without a section here: {', '.join(rest)}.", ""] if rest else [])])


def draw(results: dict[str, dict[str, Any]], path: Path) -> bool:
    """Bars: every step's time over that of our own MAE, of the same run. False if there is nothing to draw."""
    groups = []
    for name, result in results.items():
        if kind_of(result) == "step":
            for precision, found in result["precisions"].items():
                median = found["median_seconds"]
                if "mae" in median:
                    over = {key: value / median["mae"] for key, value in median.items()}
                    groups.append((f"{name}, {precision}", over))
    if not groups:
        return False
    from matplotlib.figure import Figure

    bars_of = [len(values) for _, values in groups]
    figure = Figure(figsize=(8, 1 + 0.5 * len(groups) + 0.25 * sum(bars_of)), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=bars_of)[:, 0]
    for axis, (title, values) in zip(axes, groups, strict=True):
        bars = axis.barh(list(values), list(values.values()))
        axis.bar_label(bars, fmt="%.2f")
        axis.set(title=title, xlabel="time over MAE's")
        axis.invert_yaxis()
    with replacing(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.report`."""
    parser = Parser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of raw results")
    parser.add_argument("-o", "--output", type=Path, default=None, help="Markdown (default: FOLDER/report.md)")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.folder / "report.md"
    picture = output.with_suffix(".png")
    check_place(output, "--output", endings=(".md",))
    check_place(picture, "--output's picture")
    results = load(arguments.folder)
    sections = drawn_up(results)
    with writing(output, "make room, or choose another --output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        drawn = draw({name: results[name] for name in sections}, picture)
        write_text(output, page(results, sections, picture.name if drawn else ""))
    say(f"wrote {output}{f' and {picture}' if drawn else ''}")
    if older := [name for name, result in results.items() if kind_of(result) and name not in sections]:
        say(f"passed over {', '.join(older)}: of an older form, without figures that its section has")


if __name__ == "__main__":
    run_command(main)
