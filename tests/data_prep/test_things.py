"""Garments and cliparts: what is taken, on which side, and how it looks."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep import scenes, things
from fasthpm.errors import UserError


def clipart(seed: int, side: int = 60) -> Image.Image:
    """A blob of a colour on nothing."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    corners = rng.integers(0, side // 4, 2).tolist() + (side - 1 - rng.integers(0, side // 4, 2)).tolist()
    ImageDraw.Draw(image).ellipse(corners, (*rng.integers(0, 256, 3).tolist(), 255))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine cliparts of every class, in versions of two; of the first class also files that are of no use."""
    root = tmp_path_factory.mktemp("cliparts")
    for row, name in enumerate(things.CLIPARTS):
        (root / name / "within").mkdir(parents=True)
        for number in range(9):
            path = root / name / ("within" if number % 2 else "") / f"{name}{number // 2}_author_{number % 2:02d}.png"
            clipart(100 * row + number).save(path)
    first = root / things.CLIPARTS[0]
    Image.new("RGBA", (40, 40), (255, 255, 255, 0)).save(first / "empty.png")
    Image.new("RGB", (40, 40), (9, 9, 9)).save(first / "opaque.png")
    lines = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    ImageDraw.Draw(lines).rectangle((0, 0, 59, 59), None, (0, 0, 0, 255))
    lines.save(first / "lines.png")
    clipart(0).save(first / "copy.png")
    clipart(0, 60).resize((120, 120), Image.Resampling.NEAREST).save(first / "larger_copy.png")
    clipart(0).save(first / "damaged.png")
    (first / "damaged.png").write_bytes((first / "damaged.png").read_bytes()[:60])
    return root


def marks(part: things.Cliparts, label: int) -> list[bytes]:
    return [things.in_small(picture).tobytes() for picture in part.of_class[label]]


def test_train_and_val_share_no_clipart(folder: Path) -> None:
    found = things.read_cliparts(folder, 64)
    train, val = (
        [mark for label in range(len(things.CLIPARTS)) for mark in marks(found[split], label)]
        for split in ("train", "val")
    )
    assert not set(train) & set(val)
    assert len({*train, *val}) == len(train) + len(val) == 9 * len(things.CLIPARTS)
    assert [len(pictures) for pictures in found["val"].of_class[1:]] == [2] * 6  # both versions of the fourth


def test_what_is_of_no_use_is_left_out(folder: Path) -> None:
    first = folder / things.CLIPARTS[0]
    useful = {path.stem: things.useful(path, 64) is not None for path in first.rglob("*.png")}
    assert {name for name, good in useful.items() if not good} == {"empty", "opaque", "lines", "damaged"}


def test_versions_are_of_one_group() -> None:
    assert things.group_of(Path("a/bee_mimooh_01.png")) == things.group_of(Path("b/bee_mimooh_2.png")) == "bee_mimooh"
    assert things.group_of(Path("007.png")) == "007"


def test_a_clipart_keeps_its_colours_and_its_shape() -> None:
    """Its opacity is its alpha, and what is transparent lends no colour to the edge."""
    picture = np.zeros((40, 80, 4), np.uint8)
    picture[..., :3] = (0, 255, 0)  # under nothing
    picture[8:32, 20:60] = (200, 30, 30, 255)
    part = things.Cliparts([[picture]])
    for draws in np.array([[0.0, 0.2, 0.9, 0.1, 0, 0, 0], [0.0, 1.0, 0.1, 0.9, 1, 1, 1]]):
        look = part.look(0, 100, draws)
        longest = round(100 * (0.3 + 0.3 * draws[1]))
        assert look.opacity.shape == (round(longest / 2), longest)
        seen = look.opacity > 0.5
        assert abs(seen.mean() - 0.3) < 0.05
        assert (np.abs(look.colours[seen] - [200, 30, 30]) <= 12).all()  # bicubic, and no green
        assert look.tint.tolist() == [1, 1, 1]
    left = picture.copy()
    left[:, 40:] = 0
    one, other = (things.Cliparts([[left]]).look(0, 100, np.array([0, 0.5, m, 0, 0, 0, 0])) for m in (0.1, 0.9))
    assert np.allclose(one.opacity, other.opacity[:, ::-1])


def test_scenes_of_cliparts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are where cliparts were pasted, classes are the folders, and the same command makes the same files."""
    grounds = {split: [Image.new("RGB", (200, 150))] for split in ("train", "val")}
    monkeypatch.setattr(scenes, "read_photographs", lambda files, size: grounds)
    monkeypatch.setattr(scenes, "sources", list)
    flags = ["--source", "clipart", "--cliparts", str(folder), "--number", "14", "--val_number", "7", "--size", "48"]
    for name in ("one", "two"):
        scenes.main([str(tmp_path / name), *flags, "--objects", "1", "3", "--num_workers", "1"])
    assert (tmp_path / "one" / "classes.txt").read_text().splitlines() == list(things.CLIPARTS)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    for number in range(14):
        with Image.open(tmp_path / "one" / "train" / "masks" / f"{number:08d}.png") as image:
            mask = np.asarray(image)
        with Image.open(tmp_path / "one" / "train" / "images" / f"{number:08d}.png") as image:
            pixels = np.asarray(image)
        assert 1 + number % 7 in mask
        assert mask.max() <= 7
        assert (pixels[mask > 0].max(1) > 0).mean() > 0.99


def test_cliparts_that_are_not_there_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no cliparts of recreation; apt-get install openclipart-png"):
        things.read_cliparts(tmp_path, 64)
    few = tmp_path / "few"
    for name in things.CLIPARTS:
        (few / name).mkdir(parents=True)
        clipart(1).save(few / name / "one.png")
    with pytest.raises(UserError, match=r"few has no clipart of people for train with a useful alpha channel"):
        things.read_cliparts(few, 64)


@pytest.mark.skipif(not things.OPENCLIPART.is_dir(), reason="needs apt-get install openclipart-png")
def test_debians_cliparts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few of its classes: there are tens of each, and of each some for val."""
    monkeypatch.setattr(things, "CLIPARTS", ("plants", "buildings"))
    found = things.read_cliparts(things.OPENCLIPART, 64)
    train, val = ([len(pictures) for pictures in found[split].of_class] for split in ("train", "val"))
    assert min(train) > 40
    assert min(val) > 5
