"""`fasthpm visualize`: what it draws, and what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fasthpm import recipes
from fasthpm.errors import UserError
from fasthpm.pictures import drawing, panels, visualize
from tests.helpers.runs import lone_encoder


def test_visualize_draws_files(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folder / "noise.png"), str(folder / "wide.png")]
    columns = ["image", "true_loss", "predicted_loss", "hardest", "reconstruction"]
    visualize.main([str(run), "--images", *files, "--columns", *columns, "--attention", "-o", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] == 6 * (112 + drawing.GAP) + drawing.GAP
    shown = capsys.readouterr().out
    assert "difficulty masked_query (the run's own: paper), by the student; difficulty_spearman not measured" in shown
    visualize.main([str(run), "--images", *files, "--difficulty", "paper", "-o", str(tmp_path / "b.png")])
    assert "difficulty paper, by the student" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match="both say what to draw"):
        visualize.main([str(run), "--images", *files, "--data_path", "synthetic:9"])


MAE: dict[str, Any] = {"mask_policy": "random", "predict_loss": "none"}


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [({}, "image, attention"), (MAE, "image, mask, attention"), ({**MAE, "target": "ema"}, "image, mask, attention")],
)
def test_nothing_is_drawn_of_a_decoder_that_was_never_trained(
    changes: dict[str, Any], drawn: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture of an encoder that was imported alone does not change with the decoder's random weights."""
    recipe = dataclasses.replace(recipes.debug(), **changes)
    runs = [lone_encoder(tmp_path / f"run{seed}", recipe, seed) for seed in (1, 2)]
    images = ["--images", str(folder / "noise.png"), str(folder / "half.png")]
    for run in runs:
        visualize.main([str(run), *images, "-o", str(run / "a.png")])
        assert f"2 images ({drawn}) written to" in capsys.readouterr().out
    assert (runs[0] / "a.png").read_bytes() == (runs[1] / "a.png").read_bytes()
    every = {*panels.COLUMNS, *panels.MORE_COLUMNS}
    for column in sorted(every - {*drawn.split(", ")} - ({"reconstruction"} if "target" in changes else set())):
        with pytest.raises(UserError, match=rf"columns {column} need a decoder, and .*run1 was imported without its"):
            visualize.main([str(runs[0]), *images, "--columns", "image", column, "-o", str(tmp_path / "b.png")])
    assert not (tmp_path / "b.png").exists()
