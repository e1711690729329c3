"""`fasthpm visualize`: what it draws, and what it refuses."""

from pathlib import Path

import pytest
from PIL import Image

from fasthpm.errors import UserError
from fasthpm.pictures import drawing, visualize


def test_visualize_draws_files(run: Path, folder: Path, tmp_path: Path) -> None:
    files = [str(folder / "noise.png"), str(folder / "wide.png")]
    columns = ["image", "true_loss", "predicted_loss", "hardest", "reconstruction"]
    visualize.main([str(run), "--images", *files, "--columns", *columns, "--attention", "-o", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] == 6 * (112 + drawing.GAP) + drawing.GAP
    with pytest.raises(UserError, match="both say what to draw"):
        visualize.main([str(run), "--images", *files, "--data_path", "synthetic:9"])
