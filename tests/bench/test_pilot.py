"""The papers' pilot experiment: results that are there are of the settings that are asked for."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from bench import pilot
from fasthpm.errors import UserError
from fasthpm.probes.finetune.settings import FineTune
from fasthpm.probes.tokens import POLICIES

ASKED = ["--run", "runs/mae", "--train_path", "t.beton", "--val_path", "v.beton", "--seeds", "0", "1"]


def results(out: Path, **changed: Any) -> None:
    """What trainings of `ASKED` leave, with `changed` settings in the last of them."""
    args = argparse.Namespace(
        run=Path("runs/mae"), train_path="t.beton", val_path="v.beton", epochs=1, batch_size=128, keep_tokens=0.5
    )
    for seed in (0, 1):
        for policy in POLICIES:
            asked = {**pilot.settings_of(args, policy, seed), "from_scratch": True, "difficulty_run": "runs/mae"}
            last = (seed, policy) == (1, [*POLICIES][-1])
            folder = out / f"{policy}_{seed}"
            folder.mkdir(parents=True)
            made = {"accuracy": 50.0 + seed, "settings": {**asked, **(changed if last else {})}}
            (folder / "result.json").write_text(json.dumps(made))


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a training was started")


def test_what_is_done_with_the_same_settings_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot.subprocess, "run", never)
    results(tmp_path, train_path=str(Path("t.beton").resolve()))  # the same file in other words
    pilot.main([*ASKED, "-o", str(tmp_path)])
    assert json.loads((tmp_path / "pilot.json").read_text())["accuracy"]["random"] == [50.0, 51.0]


@pytest.mark.parametrize("flag", ["run", "train_path", "val_path", "epochs", "batch_size", "keep_tokens"])
def test_results_of_other_settings_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    """Every flag that changes a training, against results of before."""
    monkeypatch.setattr(pilot.subprocess, "run", never)
    results(tmp_path)
    with pytest.raises(UserError, match="use another --out, or the same settings"):
        pilot.main([*ASKED, "-o", str(tmp_path), f"--{flag}", "0.75" if flag == "keep_tokens" else "7"])
    assert not (tmp_path / "pilot.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        *pilot.settings_of(
            argparse.Namespace(
                **dict.fromkeys(("run", "train_path", "val_path", "keep_tokens", "batch_size")), epochs=1
            ),
            "random",
            0,
        ),
        "from_scratch",
    ],
)
def test_every_setting_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The last of the results differs, and no training is begun for what lacks before it."""
    monkeypatch.setattr(pilot.subprocess, "run", never)
    assert name in FineTune.__dataclass_fields__
    results(tmp_path, **{name: "another"})
    with pytest.raises(UserError, match=f"was made with {name} another, not"):
        pilot.main([*ASKED, "2", "-o", str(tmp_path)])


def test_a_result_that_does_not_say_its_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "random_0").mkdir()
    (tmp_path / "random_0" / "result.json").write_text('{"accuracy": 11.0}')
    with pytest.raises(UserError, match="it does not say which"):
        pilot.main([*ASKED, "-o", str(tmp_path)])


@pytest.mark.parametrize("name", ["file", "file/out"])
def test_a_place_that_is_no_folder_is_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(pilot.subprocess, "run", never)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"is a file, and a folder is written|and that is a file"):
        pilot.main([*ASKED, "-o", str(tmp_path / name)])
