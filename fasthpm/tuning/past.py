"""What tells one tuning from another, kept in its checkpoints: an output folder takes no other's."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasthpm import checkpoint
from fasthpm.data.statistics import PixelStatistics
from fasthpm.errors import UserError, unlike
from fasthpm.files import file_hash, read_json

Settings = dict[str, Any]
ORIGIN = ("run", "recipe", "checkpoint", "checkpoint_hash", "effective_epochs", "pretraining_gpu_hours")
SHOWN_HASH = 12  # digits of a hash in messages


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


def describe(origin: Settings, settings: Settings, model: Settings, classes: list[str], pixels: PixelStatistics) -> str:
    """The notes of a tuning: JSON.

    - `origin`: where the encoder comes from (`probes.result.provenance`)
    - `settings`: those that decide what is learnt; `model`: what rebuilds the encoder
    """
    said = {"run": origin["run"], "settings": settings, "model": model, "classes": classes, **pixels.as_json()}
    return json.dumps({**said, "origin": {name: origin[name] for name in ORIGIN}}, indent=2) + "\n"


def refuse_other(
    kind: Kind, tuning: Any, notes: str, data: str, run: Settings, stored: Callable[[Settings], Settings] = dict
) -> None:
    """Refuse an output folder that belongs to another tuning, to other data, another run, or to a run of another kind.

    A folder without a checkpoint belongs to nothing, whatever a killed command left in it.

    - `tuning`: with `output_dir` and `resume`; `data`: what the training data is (`data.identity`): the same under
      another path is no other data; `run`: the `origin` that the run has which is named now
    - `stored`: makes old notes' settings today's

    **Raises:** `UserError` naming the first thing that differs.
    """
    output_dir = Path(tuning.output_dir)
    path = output_dir / kind.notes
    if not checkpoint.has_checkpoints(output_dir):
        if (begun := _begun_at(tuning)) is not None:
            check_origin(kind, begun, run)
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
        what = unlike(f"the {kind.thing} in {output_dir}", theirs["classes"], "the data", ours["classes"])
        raise UserError(f"{what}; use the data that it was trained for, or another --output_dir")
    if theirs["settings"] != ours["settings"]:
        raise UserError(
            f"output_dir {output_dir} belongs to a {kind.what} with other settings "
            f"({differences(theirs['settings'], ours['settings'])}); choose another --output_dir"
            f"{checkpoint.way_on(output_dir)}"
        )
    if (begun := _begun_at(tuning)) is not None:
        check_origin(kind, begun, run)
    if known and known != data:
        raise UserError(
            f"{kind.path} {mine} is not what the {kind.what} in {output_dir} was trained on: "
            f"other data lies there now (it was {known[:40]}, it is {data[:40]}); put that back, give it with "
            f"--{kind.path}, or choose another --output_dir"
        )


def differences(theirs: Settings, ours: Settings) -> str:
    """Where two of them differ, for messages."""
    return ", ".join(f"{k} {theirs.get(k)!r}, here {ours[k]!r}" for k in ours if theirs.get(k) != ours[k])


# -------------------------------------------------------------------------------------------------- where it came from
def begun_from(kind: Kind, tuning: Any, run: Settings) -> Settings:
    """The `origin_of` what a tuning goes on from; of one that begins, `run`.

    - `tuning`: with `output_dir` and `resume`; `run`: the `origin` that the run has which is named now
    """
    folder = _begun_at(tuning)
    return run if folder is None else origin_of(kind, folder, run)


def _begun_at(tuning: Any) -> Path | None:
    """Where the notes lie of what a tuning goes on from: its folder, or a checkpoint elsewhere; None if it begins."""
    if checkpoint.has_checkpoints(Path(tuning.output_dir)):
        return Path(tuning.output_dir)
    return Path(tuning.resume) if tuning.resume not in ("auto", "none") else None


def origin_of(kind: Kind, folder: Path, run: Settings) -> Settings:
    """What the result of a tuning says of its encoder.

    A run that has trained on since is told as it was, one that was only moved as it is now.

    - `folder`: of the tuning, or one of its checkpoints; `run`: the `origin` that the run has which is named now
    """
    known = _told(kind, folder)
    changed = bool(known.get("checkpoint_hash")) and known["checkpoint_hash"] != run["checkpoint_hash"]
    return {**run, **known} if changed and ORIGIN[-1] in known else run


def check_origin(kind: Kind, folder: Path, run: Settings) -> None:
    """Refuse a run that a tuning did not begin from: neither its checkpoint nor its place is the same.

    - `folder`: of the tuning, or one of its checkpoints; `run`: the `origin` that the run has which is named now

    **Raises:** `UserError` naming both. Where nothing tells, as in checkpoints of earlier versions, any run is taken.
    """
    known = _told(kind, folder)
    theirs, ours = known.get("checkpoint_hash"), run["checkpoint_hash"]
    if not theirs or not ours or theirs == ours:
        return
    places = [checkpoint.run_of(Path(one["checkpoint"])).resolve() for one in (known, run)]
    if places[0] != places[1]:
        raise UserError(
            f"the {kind.thing} in {folder} came from {known['run']} (checkpoint {theirs[:SHOWN_HASH]}), and the run "
            f"given is {run['run']} ({ours[:SHOWN_HASH]}); give the one that it came from"
        )


def _told(kind: Kind, folder: Path) -> Settings:
    """As much of the origin as is known: by the notes, by the result of earlier versions, by what lies there now."""
    notes = read_json(folder / kind.notes)
    if "origin" in notes:
        return dict(notes["origin"])
    output_dir = folder if checkpoint.has_checkpoints(folder) else checkpoint.run_of(folder)
    result, named = read_json(output_dir / "result.json"), notes.get("run", "")
    if result.get("run") == named and all(name in result for name in ORIGIN):
        return {name: result[name] for name in ORIGIN}
    try:
        there = checkpoint.checkpoint_of(Path(named)) if named else None
    except UserError:
        there = None
    manifest = there / checkpoint.MANIFEST if there else None
    if manifest is None or not manifest.is_file():
        return {}
    return {"run": named, "checkpoint": str(there), "checkpoint_hash": file_hash(manifest)}
