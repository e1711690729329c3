"""Several runs in one report."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from fasthpm import recipes
from fasthpm.errors import UserError
from fasthpm.pictures import comparison, report
from fasthpm.recipe import save_recipe
from tests.helpers.reports import written_run


def runs_in(folder: Path, *names: str) -> list[Path]:
    """Runs that have logged something."""
    for name in names:
        (folder / name).mkdir()
    return [written_run(folder / name) for name in names]


def rows_of(path: Path) -> list[list[str]]:
    """The table: its head, the line below, and a row per run."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_runs_are_compared_over_epochs_and_gpu_hours(tmp_path: Path) -> None:
    for name, best in (("one", 70.0), ("two", 75.0)):
        (tmp_path / name).mkdir()
        run = written_run(tmp_path / name)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
        del records[-1]["difficulty_auc"]
        records[-2]["difficulty_auc"] = 0.25  # measured before the last reading
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        knn = {"protocol": "DINO weighted k-NN, t", "weights": "student", "accuracy": {"10": best, "20": 5.0}}
        (run / "knn_student_cls.json").write_text(json.dumps(knn))
    (tmp_path / "two" / "linear").mkdir()
    (tmp_path / "two" / "linear" / "result.json").write_text(json.dumps({"protocol": "linear", "accuracy": 81.5}))
    (tmp_path / "two" / "old_result.json").write_text("{broken")
    report.main([str(tmp_path / "one"), str(tmp_path / "two"), "-o", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out" / "comparison.md")
    assert rows[0][6:10] == ["difficulty", "teacher_spearman", "difficulty_spearman", "difficulty_auc"]
    assert rows[2][6:10] == ["paper", "7", "7", "0.25"]
    assert rows[0][-2:] == ["DINO weighted k-NN, t, student", "linear"]
    assert rows[2][0] == "one"
    assert rows[2][-2:] == ["70.00", ""]
    assert rows[3][-2:] == ["75.00", "81.50"]
    with Image.open(tmp_path / "out" / "comparison.png") as curves:
        assert curves.size == (1200, 800)
    with pytest.raises(UserError, match="is missing"):
        report.main([str(tmp_path / "one"), str(tmp_path)])


def test_every_evaluation_has_a_place_and_shares_it_with_its_like_alone(tmp_path: Path) -> None:
    """Whatever the protocols of two runs, no figure is lost, and none stands under another protocol."""
    tuned, linear = ("fine-tune, 1 epochs", "fine-tune, 100 epochs"), "linear (moco), 2 epochs, cached"
    protocols = [*tuned, linear, tuned[0]]
    runs = runs_in(tmp_path, "one", "two")
    for run, kept in zip(runs, (range(4), range(1, 3)), strict=True):
        for number in kept:
            (run / f"e{number}").mkdir()
            made = {"protocol": protocols[number], "accuracy": 10.0 * number + len(run.name)}
            (run / f"e{number}" / "result.json").write_text(json.dumps(made))
    report.main([*map(str, runs), "-o", str(tmp_path / "out")])
    head, _, *rows = rows_of(tmp_path / "out" / "comparison.md")
    found = [{name: cell for name, cell in zip(head, row, strict=True) if "epochs" in name[1:]} for row in rows]
    both = {"fine-tune, 100 epochs": "13.00", "linear (moco), 2 epochs, cached": "23.00"}
    twice = {"fine-tune, 1 epochs (e0/result.json)": "3.00", "fine-tune, 1 epochs (e3/result.json)": "33.00"}
    assert [{name: cell for name, cell in row.items() if name != "epochs"} for row in found] == [
        both | twice,
        both | dict.fromkeys(twice, ""),
    ]


def test_a_run_that_reconstructs_nothing_is_drawn_by_its_loss(tmp_path: Path) -> None:
    runs = runs_in(tmp_path, "pixels", "views")
    save_recipe(dataclasses.replace(recipes.from_name("hpm_ibot_demo"), steps_per_epoch=2), runs[1] / "recipe.json")
    records = [{"step": 1, "epoch": 0.5, "loss": 3.0}, {"step": 2, "epoch": 1, "loss": None}]
    (runs[1] / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    report.main([*map(str, runs), "-o", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out" / "comparison.md")
    assert [row[5] for row in rows[2:]] == ["7", ""]
    figure = comparison.draw([comparison.read_run(run) for run in runs])
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines == {"pixels": [[0.5, 9.0], [1.0, 7.5], [1.5, 7.0]], "views: loss": [[0.5, 3.0]]}


@pytest.mark.parametrize("kind", ["finetune", "segment", "detect"])
def test_a_tuning_is_not_compared(kind: str, tmp_path: Path) -> None:
    runs = runs_in(tmp_path, "one", "tuned")
    (runs[1] / f"{kind}.json").write_text("{}")
    with pytest.raises(UserError, match=rf"tuned is what fasthpm {kind} wrote, and runs of pretraining are compared"):
        report.main([*map(str, runs), "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_damaged_evaluation_is_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = runs_in(tmp_path, "one", "two")
    (runs[0] / "knn_student_cls.json").write_text('{"accuracy": {"1')
    report.main([*map(str, runs), "-o", str(tmp_path / "out")])
    assert "warning: " + str(runs[0] / "knn_student_cls.json") + " is damaged or empty" in capsys.readouterr().err
