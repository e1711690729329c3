"""Whose an output folder of a fine-tuning is: nobody's without a checkpoint; its data is known by what it holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from fasthpm.errors import UserError
from fasthpm.probes.finetune.building import refuse_other
from fasthpm.probes.finetune.settings import FineTune
from tests.helpers.runs import write


def notes(**settings: Any) -> str:
    science = FineTune(**{"train_path": "train.beton", **settings}).science
    return json.dumps({"model": {"dim": 8}, "classes": ["a", "b"], "settings": science})


def leave(folder: Path, data: str | None, *, checkpoint: bool = True, **settings: Any) -> None:
    """What an interrupted fine-tuning left; `data`: None in the form from before it was kept."""
    folder.mkdir(exist_ok=True)
    (folder / "finetune.json").write_text(notes(**settings))
    if checkpoint:
        path = write(folder, 4) / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **({} if data is None else {"data": data})}))


def refusal(folder: Path, ours: str, data: str) -> str:
    with pytest.raises(UserError) as caught:
        refuse_other(folder, ours, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_a_checkpoint_has_no_past(tmp_path: Path) -> None:
    leave(tmp_path, None, checkpoint=False, epochs=3)
    (tmp_path / "checkpoints").mkdir()
    refuse_other(tmp_path, notes(epochs=5), "sha256:1")


def test_other_settings_are_refused_with_a_way_on(tmp_path: Path) -> None:
    leave(tmp_path, "sha256:1", epochs=3)
    said = refusal(tmp_path, notes(epochs=5), "sha256:1")
    assert "other settings (epochs 3, here 5)" in said
    assert f"--resume {tmp_path / 'checkpoints' / 'step-00000004'}" in said
    assert "--init_from" not in said  # which fine-tuning does not have


def test_the_data_is_what_it_holds_and_not_its_path(tmp_path: Path) -> None:
    leave(tmp_path, "sha256:1")
    refuse_other(tmp_path, notes(), "sha256:1")
    refuse_other(tmp_path, notes(train_path="moved.beton"), "sha256:1")
    assert "train_path train.beton is not what the fine-tuning in" in refusal(tmp_path, notes(), "sha256:2")
    assert "train_path 'train.beton', here 'moved.beton'" in refusal(
        tmp_path, notes(train_path="moved.beton"), "sha256:2"
    )


def test_a_fine_tuning_from_before_knows_the_path_alone(tmp_path: Path) -> None:
    leave(tmp_path, None)
    refuse_other(tmp_path, notes(), "sha256:1")
    assert "train_path 'train.beton'" in refusal(tmp_path, notes(train_path="moved.beton"), "sha256:1")


def test_checkpoints_of_another_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert "holds checkpoints of another kind" in refusal(tmp_path, notes(), "")
