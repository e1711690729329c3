"""`fasthpm visualize`: what it draws, and what it refuses."""

from pathlib import Path

import pytest
from PIL import Image

from fasthpm.errors import UserError
from fasthpm.pictures import drawing, visualize


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
