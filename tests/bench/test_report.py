"""The report of the step benches."""

import json
import shutil
from pathlib import Path

import pytest

from bench import end_to_end, report, scaling
from bench.training import READ
from fasthpm.errors import UserError
from tests.helpers.launch import ROOT

RESULTS = ROOT / "bench" / "results"


def test_a_report_pairs_every_speed_up_with_its_baseline(tmp_path: Path) -> None:
    spread = {"median": 2.0, "low": 1.0, "high": 3.0}
    figures = dict.fromkeys(READ, spread)
    made = {
        "a_end.json": {
            "bench": "end_to_end",
            "figures": {"hpm": figures},
            "epoch_seconds": {"hpm": 5.0},
            "time_over_mae": {},
        },
        "b_scaling.json": {"bench": "scaling", "images_per_second": {"case": spread}, "efficiency": {}},
        "c_old.json": {"bench": "step", "seconds": {}},
    }
    for name, result in made.items():
        (tmp_path / name).write_text(json.dumps(result))
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "| hpm | 2.0 (1.0 to 3.0) | 5 | 2.0 (1.0 to 3.0) |  |" in text
    assert "Raw results without a section here: c_old.json." in text
    assert not (tmp_path / "report.png").exists()
    assert {end_to_end.METHODS["hpm"], ()} == {()}
    assert scaling.name_of((1, 2, 3)) == "stage 1, 2 ranks, accumulation 3"


def test_the_results_that_lie_here_become_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of every bench and of any age; the place is made, and what has no section is named."""
    report.main([str(RESULTS), "-o", str(tmp_path / "new" / "r.md")])
    text = (tmp_path / "new" / "r.md").read_text()
    assert (tmp_path / "new" / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["r.md", "r.png"]
    assert all(path.name in text for path in RESULTS.glob("*.json"))
    assert "passed over losses_cpu_1core.json: of an older form" in capsys.readouterr().err


@pytest.mark.parametrize("kind", report.SECTIONS)
@pytest.mark.parametrize("rest", [{}, {"cases": [0.5]}, {"precisions": [1.0]}, {"figures": 3, "shapes": "x"}])
def test_results_of_another_form_are_named(
    tmp_path: Path, kind: str, rest: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"bench": kind, **rest}))
    report.main([str(tmp_path)])
    assert "without a section here: a.json." in (tmp_path / "report.md").read_text()
    assert "passed over a.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.png", "expected a name that ends in .md"),
        ("x", "expected a name that ends in .md"),
        ("folder.md", "is a folder; name a file"),
        ("picture.md", "--output's picture is .*picture.png, which is a folder"),
        ("file/x.md", "and that is a file"),
    ],
)
def test_places_that_do_not_do_are_refused_with_nothing_written(tmp_path: Path, name: str, message: str) -> None:
    for folder in ("results", "folder.md", "picture.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    shutil.copy(RESULTS / "step_vit_base_cpu_2cores.json", tmp_path / "results")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        report.main([str(tmp_path / "results"), "-o", str(tmp_path / name)])
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="is a file, expected the folder"):
        report.main([str(tmp_path / "results" / "step_vit_base_cpu_2cores.json"), "-o", str(tmp_path / "y.md")])
