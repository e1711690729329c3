"""Where a tuning came from: kept in its notes, and no other run gets the credit."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from fasthpm.checkpoint import FINETUNE_NOTES, MANIFEST, RECIPE
from fasthpm.errors import UserError
from fasthpm.files import file_hash
from fasthpm.tuning import past

KIND = past.Kind(FINETUNE_NOTES, "fine-tuning", "classifier", "train_path")


def origin(run: str, digest: str) -> dict[str, Any]:
    """As `probes.result.provenance` has it."""
    checkpoint = f"{run}/checkpoints/step-00000004"
    return {
        "run": run,
        "recipe": "debug",
        "checkpoint": checkpoint,
        "checkpoint_hash": digest,
        "effective_epochs": 1.0,
        "pretraining_gpu_hours": 2.0,
        "versions": {"torch": "now"},
    }


def tuned(folder: Path, notes: dict[str, Any], result: dict[str, Any] | None = None) -> Path:
    """A checkpoint of a tuning with these notes, its output folder with this result."""
    made = folder / "checkpoints" / "step-00000002"
    made.mkdir(parents=True)
    for path in (folder, made):
        (path / FINETUNE_NOTES).write_text(json.dumps(notes))
    (folder / "result.json").write_text(json.dumps(result or {}))
    return made


OURS = origin("/runs/a", "1" * 64)
BEFORE = {"run": "/runs/a"}  # notes of earlier versions


@pytest.mark.parametrize(
    ("notes", "result", "run", "taken"),
    [
        ({**BEFORE, "origin": OURS}, {}, OURS, True),
        ({**BEFORE, "origin": OURS}, {}, origin("/moved/b", "1" * 64), True),
        ({**BEFORE, "origin": OURS}, {}, origin("/runs/a", "2" * 64), True),  # it has trained on since
        ({**BEFORE, "origin": OURS}, {}, origin("/runs/b", "2" * 64), False),
        ({**BEFORE, "origin": OURS}, {}, origin("/runs/b", ""), True),  # an import without a manifest
        (BEFORE, OURS, origin("/moved/b", "1" * 64), True),
        (BEFORE, OURS, origin("/runs/b", "2" * 64), False),
        (BEFORE, {}, origin("/runs/b", "2" * 64), True),
        ({}, {}, origin("/runs/b", "2" * 64), True),
    ],
)
def test_a_run_that_a_tuning_did_not_begin_from_is_refused(
    tmp_path: Path, notes: dict[str, Any], result: dict[str, Any], run: dict[str, Any], taken: bool
) -> None:
    folder = tuned(tmp_path, notes, result)
    words = "the classifier in .* came from /runs/a .checkpoint 111111111111., and the run given is /runs/b .22222222"
    for place in (folder, tmp_path):
        with contextlib.nullcontext() if taken else pytest.raises(UserError, match=words):
            past.check_origin(KIND, place, run)


def test_earlier_versions_notes_are_read_by_what_lies_there_now(tmp_path: Path) -> None:
    """They had the run's path alone."""
    there = tmp_path / "a" / "checkpoints" / "step-00000004"
    there.mkdir(parents=True)
    for name in (RECIPE, "student.safetensors", MANIFEST):
        (there / name).write_text("{}")
    folder = tuned(tmp_path / "ft", {"run": str(there)})
    past.check_origin(KIND, folder, origin("/moved/a", file_hash(there / MANIFEST)))
    past.check_origin(KIND, folder, origin(str(tmp_path / "a"), "2" * 64))
    with pytest.raises(UserError, match="came from"):
        past.check_origin(KIND, folder, origin("/runs/b", "2" * 64))


def test_the_credit_is_that_of_the_run_as_it_was(tmp_path: Path) -> None:
    folder = tuned(tmp_path, {**BEFORE, "origin": {name: OURS[name] for name in past.ORIGIN}})
    later = {**origin("/runs/a", "2" * 64), "effective_epochs": 9.0, "versions": {"torch": "later"}}
    assert past.origin_of(KIND, folder, later) == {**OURS, "versions": {"torch": "later"}}
    moved = origin("/moved/b", "1" * 64)
    assert past.origin_of(KIND, folder, moved) == moved


def test_a_tuning_that_goes_on_keeps_its_origin(tmp_path: Path) -> None:
    """Also one that branches off from a checkpoint of another folder."""

    class Settings:
        output_dir, resume = str(tmp_path / "ft"), "auto"

    settings, later = Settings(), origin("/runs/a", "2" * 64)
    assert past.begun_from(KIND, settings, later) == later
    folder = tuned(tmp_path / "ft", {**BEFORE, "origin": OURS})
    assert past.begun_from(KIND, settings, later)["checkpoint_hash"] == "1" * 64
    settings.output_dir, settings.resume = str(tmp_path / "branch"), str(folder)
    assert past.begun_from(KIND, settings, later)["checkpoint_hash"] == "1" * 64
    with pytest.raises(UserError, match="came from /runs/a"):
        past.refuse_other(KIND, settings, "{}", "", origin("/runs/b", "2" * 64))
