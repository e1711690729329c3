"""What tells one tuning from another, kept in its checkpoints: an output folder takes no other's."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasthpm import checkpoint
from fasthpm.data.statistics import PixelStatistics
from fasthpm.errors import UserError

Settings = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What the tunings of one command are called.

    - `notes`: the file that describes one, in its folder and its checkpoints
    - `what`, `thing`: its own name, and that of what it makes, for messages; `path`: the setting that names its data
    """

    notes: str
    what: str
    thing: str
    path: str


def describe(run: Path, settings: Settings, model: Settings, classes: list[str], pixels: PixelStatistics) -> str:
    """The notes of a tuning: JSON.

    - `settings`: those that decide what is learnt; `model`: what rebuilds the encoder
    """
    said = {"run": str(run), "settings": settings, "model": model, "classes": classes, **pixels.as_json()}
    return json.dumps(said, indent=2) + "\n"


def refuse_other(
    kind: Kind, output_dir: Path, notes: str, data: str, stored: Callable[[Settings], Settings] = dict
) -> None:
    """Refuse an output folder that belongs to another tuning, to other data, or to a run of another kind.

    A folder without a checkpoint belongs to nothing, whatever a killed command left in it.

    - `data`: what the training data is (`data.identity`): the same under another path is no other data
    - `stored`: makes old notes' settings today's

    **Raises:** `UserError` naming the first thing that differs.
    """
    path = output_dir / kind.notes
    if not checkpoint.has_checkpoints(output_dir):
        return
    if not path.is_file():
        raise UserError(f"output_dir {output_dir} holds checkpoints of another kind; choose another --output_dir")
    theirs, ours = json.loads(path.read_text()), json.loads(notes)
    theirs["settings"] = stored(theirs["settings"])
    mine = ours["settings"][kind.path]
    known = checkpoint.data_of(output_dir, theirs["settings"][kind.path], mine)
    if known == data:
        theirs["settings"][kind.path] = mine
    if theirs["model"] != ours["model"]:
        raise UserError(
            f"output_dir {output_dir} holds the {kind.thing} of another architecture "
            f"({differences(theirs['model'], ours['model'])}); choose another --output_dir"
        )
    if theirs["classes"] != ours["classes"]:
        raise UserError(
            f"the {kind.thing} in {output_dir} has {len(theirs['classes'])} classes, the data has "
            f"{len(ours['classes'])} or others; use the data that it was trained for, or another --output_dir"
        )
    if theirs["settings"] != ours["settings"]:
        raise UserError(
            f"output_dir {output_dir} belongs to a {kind.what} with other settings "
            f"({differences(theirs['settings'], ours['settings'])}); choose another --output_dir"
            f"{checkpoint.way_on(output_dir)}"
        )
    if known and known != data:
        raise UserError(
            f"{kind.path} {mine} is not what the {kind.what} in {output_dir} was trained on: "
            f"other data lies there now (it was {known[:40]}, it is {data[:40]}); put that back, give it with "
            f"--{kind.path}, or choose another --output_dir"
        )


def differences(theirs: Settings, ours: Settings) -> str:
    """Where two of them differ, for messages."""
    return ", ".join(f"{k} {theirs.get(k)!r}, here {ours[k]!r}" for k in ours if theirs.get(k) != ours[k])
