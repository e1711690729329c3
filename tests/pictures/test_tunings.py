"""Reports of fine-tunings, segmentations and detections."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fasthpm.__main__ import dispatch
from fasthpm.errors import UserError
from fasthpm.pictures import tunings


def wrote(folder: Path, kind: str, *, finished: bool) -> Path:
    """What a tuning of three readings leaves."""
    folder.mkdir()
    (folder / f"{kind}.json").write_text("{}")
    readings = [
        {"step": step, "epoch": step / 30, "time": 0, "loss": 3.0 / step, "loss_seg": 2.0 / step, "lr": 1e-3}
        | {"seconds": 2.0, "data_wait": 0.25, "images_per_second": 80.0, "bad_samples": 0}
        | ({"miou": 12.5} if step == 30 else {})
        for step in (10, 20, 30)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in readings))
    if finished:
        made = {"protocol": "segment, 30 updates of 8", "run": "runs/a", "recipe": "hpm_demo"}
        (folder / "result.json").write_text(json.dumps(made))
        (folder / "result.md").write_text("| miou |\n|---|\n| 12.50 |\n")
        Image.new("RGB", (8, 8)).save(folder / "pictures.png")
    return folder


@pytest.mark.parametrize("kind", ["finetune", "segment", "detect"])
def test_a_finished_one_has_its_result_figures_and_pictures(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = wrote(tmp_path / "out", kind, finished=True)
    assert tunings.kind_of(folder) == kind
    dispatch(["report", str(folder)])
    text = (folder / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("# segment, 30 updates of 8\n")
    assert "| 12.50 |" in text
    assert "| loss_seg | 0.2 | 0.06667 |" in text
    assert "| miou |  | 12.5 |" in text
    assert "](pictures.png)" in text
    with Image.open(folder / "curves.png") as curves:
        assert curves.size == (1200, 600)


def test_one_under_way_says_how_far_it_is(tmp_path: Path) -> None:
    folder = wrote(tmp_path / "out", "segment", finished=False)
    text = tunings.write(folder).read_text()
    assert text.startswith("# segment, not finished: update 30\n")
    assert "pictures.png" not in text


def test_a_folder_of_neither_kind_is_one_line(tmp_path: Path) -> None:
    folder = wrote(tmp_path / "out", "segment", finished=False)
    (folder / "segment.json").unlink()
    with pytest.raises(UserError, match=r"no output_dir of a run"):
        dispatch(["report", str(folder)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("result.json", '{"protocol'),
        ("result.json", "[1]"),
        ("result.json", '{"protocol": "segment"}'),
        ("metrics.jsonl", '{"step": 1, "loss": 3}'),
        ("metrics.jsonl", '{"step": 1, "epoch": 1, "loss": []}'),
    ],
)
def test_a_damaged_file_of_a_tuning_is_named_in_one_line(name: str, text: str, tmp_path: Path) -> None:
    folder = wrote(tmp_path / "out", "segment", finished=True)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=rf"^{folder / name} "):
        dispatch(["report", str(folder)])
    assert not [one for one in ("report.md", "curves.png") if (folder / one).exists()]
