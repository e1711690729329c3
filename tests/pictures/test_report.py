"""Reports: figures from what a run wrote."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from fasthpm import recipes
from fasthpm.errors import UserError
from fasthpm.pictures import report
from fasthpm.recipe import save_recipe
from fasthpm.run import records as run_records
from tests.helpers.reports import written_run


def test_report_tells_first_last_and_gain(tmp_path: Path) -> None:
    run = written_run(tmp_path)
    assert [record["loss"] for record in run_records.read_metrics(run)] == [9.0, 7.5, 7.0]
    for weights, best in (("untrained", 60.0), ("student", 77.5)):
        result = {"weights": weights, "pool": "mean", "bank_size": 1000, "accuracy": {"10": best, "20": 50.0}}
        (run / f"knn_{weights}_mean.json").write_text(json.dumps(result))
    for epochs, accuracy in ((12, 77.5), (3, 65.25)):  # whichever is found first
        aside = {**result, "effective_epochs": epochs, "accuracy": {"10": accuracy, "20": 50.0}}
        (run / f"knn_student_mean_{epochs}.json").write_text(json.dumps(aside))
    text = report.write(run).read_text()
    assert "| loss | 9 | 7 |" in text
    rows = ["| 1,000 | student |  | mean | 77.50 | 50.00 |", "| 1,000 | student | 3 | mean | 65.25 | 50.00 |"]
    assert "\n".join([*rows, "| 1,000 | student | 12 | mean | 77.50 | 50.00 |"]) in text
    assert "+17.50 points over the untrained encoder with 1,000 labelled" in text
    with Image.open(run / "curves.png") as curves:
        assert curves.size == (1200, 600)


@pytest.mark.parametrize(
    ("changes", "figures", "line"),
    [
        ({}, {}, "Difficulty: paper; difficulty_spearman not measured."),
        (
            {"difficulty": "in_place"},
            {"difficulty_spearman": 0.61, "difficulty_auc": 0.75},
            "Difficulty: in_place; difficulty_spearman 0.610, difficulty_auc 0.750 at update 2.",
        ),
        ({"mask_policy": "random", "predict_loss": "none"}, {}, "Difficulty: none, for nobody learns it."),
    ],
)
def test_report_of_records_that_not_all_have_every_figure(
    tmp_path: Path, changes: dict[str, str], figures: dict[str, float], line: str
) -> None:
    """The difficulty is measured now and then; runs of earlier versions never did."""
    run = written_run(tmp_path)
    save_recipe(dataclasses.replace(recipes.debug(), steps_per_epoch=2, **changes), run / "recipe.json")  # type: ignore[arg-type]
    records = run_records.read_metrics(run)
    for record in records:
        for name in ("difficulty_spearman", "difficulty_auc"):
            del record[name]
        record |= figures if record["step"] == 2 else {}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    text = report.write(run).read_text()
    assert line in text.splitlines()
    assert ("| difficulty_spearman |" in text) == bool(figures)
    assert not figures or "| difficulty_spearman |  |  |" in text  # neither at the first nor at the last reading


def test_the_report_of_one_run_goes_nowhere_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """-o is of comparisons; given with one run it must not be passed over in silence."""
    run = written_run(tmp_path)
    with pytest.raises(UserError, match=r"output is .*elsewhere.* and the report of one run is kept in the run"):
        report.main([str(run), "-o", str(tmp_path / "elsewhere")])
    assert not (run / "report.md").exists()
    report.main([str(run)])
    assert f"written to {run / 'report.md'}" in capsys.readouterr().out


KNN = {"weights": "student", "pool": "cls", "bank_size": 0, "accuracy": {"10": 50.0}}
DAMAGES: list[tuple[str, str, bool]] = [  # file, what it holds, whether a comparison reads it
    *((name, text, True) for name in ("versions.json", "recipe.json") for text in ("", '{"world', "[1]", "3", "null")),
    ("recipe.json", '{"epochs": "many"}', True),
    ("recipe.json", '{"epoch": 3}', True),
    ("versions.json", "{}", True),
    ("versions.json", '{"world_size": "two"}', True),
    ("versions.json", '{"world_size": 1}', False),
    *(("knn_student_cls.json", json.dumps(KNN)[:cut], False) for cut in (0, 9, 60)),
    *(("knn_student_cls.json", json.dumps({k: v for k, v in KNN.items() if k != name}), False) for name in KNN),
    *(("knn_student_cls.json", json.dumps({**KNN, "accuracy": wrong}), False) for wrong in ({}, 3, {"10": "x"})),
    *(("knn_student_cls.json", json.dumps({**KNN, "effective_epochs": wrong}), False) for wrong in ("3", None)),
    ("metrics.jsonl", '{"step": 1, "loss": 3}', True),
    ("metrics.jsonl", '{"step": 1, "epoch": null, "loss": 3}', True),
    ("metrics.jsonl", '{"step": 1, "epoch": 1, "loss": "3"}', True),
    ("metrics.jsonl", '{"step": "1", "epoch": 1}\n{"epoch": 1}\n[1]\n', True),
]


@pytest.mark.parametrize(("name", "text", "compared"), DAMAGES)
def test_a_damaged_file_is_named_in_one_line(name: str, text: str, compared: bool, tmp_path: Path) -> None:
    """Whatever of it is wrong; and no report is begun."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        run.mkdir()
        written_run(run)
    (runs[0] / name).write_text(text)
    for line in ([runs[0]], [*runs, "-o", tmp_path / "out"])[: 1 + compared]:
        with pytest.raises(UserError) as caught:
            report.main(list(map(str, line)))
        assert str(runs[0] / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("report.md", "curves.png", "out")]


def test_report_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing"):
        report.write(tmp_path)
