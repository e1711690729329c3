"""Pictures of objects: where boxes, masks and names are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasthpm.dense.detection.pictures import MOST, SURE, Example, Shown, best, colour, draw, panel, said, save
from fasthpm.errors import UserError


def shown(label: int = 1, score: float | None = None) -> Shown:
    mask = np.zeros((64, 96), np.uint8)
    mask[20:40, 30:60] = 1
    return Shown(label, score, (30.0, 20.0, 60.0, 40.0), mask)


def example(found: int = 1, size: tuple[int, int] = (64, 96)) -> Example:
    return Example(np.full((*size, 3), 200, np.uint8), [shown()], [shown(2, 0.9)] * found)


def test_masks_and_boxes_are_where_they_belong() -> None:
    """Enlarged to 256 pixels; inside the mask the class's colour shines through."""
    sheet = np.asarray(panel(example().image, [shown(3)], ["a", "b", "c"]))
    assert sheet.shape == (171, 256, 3)
    scale = 256 / 96
    inside = sheet[int(32 * scale), int(50 * scale)].astype(int)
    wanted = 0.55 * 200 + 0.45 * np.array(colour(3))
    assert np.abs(inside - wanted).max() <= 2
    assert (sheet[-5, 5] == 200).all()
    edge = sheet[round(20 * scale), int(59 * scale)].tolist()
    assert edge == list(colour(3))


@pytest.mark.parametrize("size", [(64, 96), (700, 40), (40, 2000)])
def test_any_size(size: tuple[int, int]) -> None:
    mask = np.ones(size, np.uint8)
    one = Shown(1, 0.5, (-3.0, -3.0, size[1] + 9.0, size[0] + 9.0), mask)
    sheet = panel(np.zeros((*size, 3), np.uint8), [one], ["a very long name of a class"])
    assert 256 <= max(sheet.size) <= 512


def test_the_best_detections_are_drawn() -> None:
    found = [shown(1, score) for score in np.linspace(0.01, 0.99, 60)]
    kept = best(found)
    assert len(kept) == MOST
    assert kept[-1].score == pytest.approx(0.99)
    assert all(one.score >= SURE for one in kept)
    unsure = [shown(1, score) for score in (0.04, 0.09, 0.1, 0.2)]
    assert [one.score for one in best(unsure)] == [0.1, 0.2]
    assert best([]) == []


def test_names_and_scores() -> None:
    assert said(shown(2, 0.876), ["a", "b"]) == "b 0.88"
    assert said(shown(2), ["a", "b"]) == "b"
    assert said(shown(0), ["a", "b"]) == "crowd"
    assert len({colour(label) for label in range(20)}) == 20


def test_a_sheet_has_two_columns_and_a_row_per_image(tmp_path: Path) -> None:
    sheet = draw([example(), example(0)], ["a", "b"])
    assert sheet.width > 2 * 256
    assert sheet.height > 2 * 171
    left, right = (np.asarray(sheet)[200:, half] for half in (slice(0, 260), slice(264, None)))
    assert not np.array_equal(left[:, :250], right[:, :250])
    save([example()], ["a", "b"], tmp_path / "new" / "pictures.png")
    with Image.open(tmp_path / "new" / "pictures.png") as made:
        assert made.format == "PNG"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save([example()], ["a", "b"], tmp_path / "file" / "pictures.png")
