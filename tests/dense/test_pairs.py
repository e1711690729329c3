"""Image and mask files: what their values mean, and what is refused before anything starts."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fasthpm.dense import pairs
from fasthpm.dense.loader import Unreadable
from fasthpm.errors import UserError
from tests.helpers.pairs import GARMENTS, ade, colour, own, scenes_folder, write

VALUES = np.array([[0, 1, 2], [3, 0, 255]], np.uint8)


def open_(root: Path | str = "", split: str = "train", **options: Any) -> pairs.PairSet:
    kinds = {name: options.pop(name) for name in ("channels", "limit") if name in options}
    return pairs.open_pairs(pairs.PairFiles(data_path=str(root or ""), **options), split, **kinds)


def refused(*args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------- layouts
def test_scenes(tmp_path: Path) -> None:
    found = open_(scenes_folder(tmp_path, [VALUES, np.zeros_like(VALUES)]))
    assert len(found) == 2
    assert found.classes == ("background", *GARMENTS)
    assert found.repeats() is None
    assert Path(found.name(0)) == tmp_path / "train" / "images" / "0.png"
    image, labels = found.read(0)
    assert image.dtype == labels.dtype == np.uint8
    assert np.array_equal(image, colour(VALUES.shape, 0))
    assert np.array_equal(labels, VALUES)
    assert np.array_equal(found.read(1)[1], np.zeros_like(VALUES))
    assert len(open_(tmp_path, "val")) == 2


@pytest.mark.parametrize("inside", ["", "ADEChallengeData2016"])
def test_ade20k_as_it_is(tmp_path: Path, inside: str) -> None:
    """0 is ignored, 1..150 are the classes; JPEG images, PNG masks."""
    ade(tmp_path / inside, [np.array([[0, 1, 2], [150, 13, 0]], np.uint8)])
    for split in ("train", "val"):
        found = open_(tmp_path, split)
        assert len(found.classes) == 150
        assert found.classes[:2] == ("class 1", "class 2, other name")
        image, labels = found.read(0)
        assert labels.tolist() == [[255, 0, 1], [149, 12, 255]]
        assert image.shape == (2, 3, 3)
    assert "the value 200, expected 1 (class 1) to 150 (class 150), and 0 and 255 (ignored)" in refused(
        ade(tmp_path / "wrong", [np.full((2, 3), 200, np.uint8)])
    )


MEANINGS = {  # --background: the classes, and what VALUES become
    "class": (("background", *GARMENTS), [[0, 1, 2], [3, 0, 255]]),
    "ignore": (GARMENTS, [[255, 0, 1], [2, 255, 255]]),
    "first": (GARMENTS, [[0, 1, 2], [3, 0, 255]]),
}


@pytest.mark.parametrize("background", MEANINGS)
def test_folders_of_ones_own(tmp_path: Path, background: str) -> None:
    found = open_(**own(tmp_path, [VALUES]), background=background)
    classes, labels = MEANINGS[background]
    assert found.classes == classes
    assert found.read(0)[1].tolist() == labels


def test_any_value_may_be_the_ignored_one(tmp_path: Path) -> None:
    options = own(tmp_path, [np.array([[0, 1, 9]], np.uint8)])
    assert open_(**options, background="first", ignore_index=9).read(0)[1].tolist() == [[0, 1, 255]]
    no_nines = own(tmp_path / "no nines", [np.array([[0, 1, 2]], np.uint8)])
    assert open_(**no_nines, background="first", ignore_index=1).read(0)[1].tolist() == [[0, 255, 2]]
    with pytest.raises(UserError, match=r"value 9, expected 0 \(shirt\) to 3 \(boot\), and 255 \(ignored\)"):
        open_(**options, background="first")
    assert open_(**own(tmp_path / "wide", [np.array([[0, 65535]], np.uint16)]), background="first", ignore_index=65535)


def test_a_background_that_the_file_names_is_not_added(tmp_path: Path) -> None:
    options = own(tmp_path, [VALUES], classes=("Background", *GARMENTS))
    assert open_(**options, background="class").classes == ("Background", *GARMENTS)


def test_names_agree_in_folders_within(tmp_path: Path) -> None:
    for name, folder in (("a", "one"), ("b", "one"), ("a", "two")):
        write(tmp_path / "images" / folder / f"{name}.jpg", colour((4, 5), 0))
        write(tmp_path / "masks" / folder / f"{name}.png", np.zeros((4, 5), np.uint8))
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "masks" / "notes.txt").write_bytes(b"x")
    (tmp_path / "classes").write_text("a\nb\n\n")
    found = open_(
        train_images=str(tmp_path / "images"),
        train_masks=str(tmp_path / "masks"),
        classes=str(tmp_path / "classes"),
        background="first",
    )
    assert [str(Path(found.name(k)).relative_to(tmp_path / "images")) for k in range(3)] == [
        "one/a.jpg",
        "one/b.jpg",
        "two/a.jpg",
    ]


def test_a_part_is_spread_evenly(tmp_path: Path) -> None:
    root = scenes_folder(tmp_path, [VALUES] * 9)
    found = open_(root, limit=3)
    assert [Path(found.name(k)).stem for k in range(len(found))] == ["0", "4", "8"]
    assert len(open_(root, limit=20)) == 9


# -------------------------------------------------------------------------------------------------- kinds of files
def packed_png(values: np.ndarray, depth: int) -> bytes:
    """Grey with `depth` bits a pixel, written by hand: Pillow writes 8 or 1."""
    per_byte = 8 // depth
    rows = b""
    for row in values:
        padded = np.pad(row, (0, -len(row) % per_byte)).reshape(-1, per_byte)
        shifts = np.arange(8 - depth, -1, -depth)
        rows += b"\0" + (padded << shifts).sum(1).astype(np.uint8).tobytes()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", values.shape[1], len(values), depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def palette(values: np.ndarray, kind: str) -> bytes:
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    return saved(image, kind)


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


SMALL = np.array([[0, 1, 2, 3, 1], [3, 2, 0, 0, 1]], np.uint8)
KINDS: dict[str, Callable[[], bytes]] = {
    "grey.png": lambda: saved(Image.fromarray(SMALL), "PNG"),
    "four bits.png": lambda: packed_png(SMALL, 4),
    "two bits.png": lambda: packed_png(SMALL, 2),
    "16 bits.png": lambda: saved(Image.fromarray(SMALL.astype(np.uint16)), "PNG"),
    "palette.png": lambda: palette(SMALL, "PNG"),
    "palette.gif": lambda: palette(SMALL, "GIF"),
    "grey.tif": lambda: saved(Image.fromarray(SMALL), "TIFF"),
    "16 bits.tif": lambda: saved(Image.fromarray(SMALL.astype(np.uint16)), "TIFF"),
    "32 bits.tif": lambda: saved(Image.fromarray(SMALL.astype(np.int32)), "TIFF"),
    "grey.bmp": lambda: saved(Image.fromarray(SMALL), "BMP"),
    "grey.pgm": lambda: saved(Image.fromarray(SMALL), "PPM"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_one_channel(tmp_path: Path, kind: str) -> None:
    options = own(tmp_path, [SMALL])
    (tmp_path / "masks" / "0.png").unlink()
    (tmp_path / "masks" / "0").with_suffix(Path(kind).suffix).write_bytes(KINDS[kind]())
    assert np.array_equal(open_(**options, background="first").read(0)[1], SMALL)


@pytest.mark.parametrize("value", [-1, 70000])
def test_values_of_32_bits_outside_are_no_class(tmp_path: Path, value: int) -> None:
    options = own(tmp_path, [SMALL])
    (tmp_path / "masks" / "0.png").unlink()
    Image.fromarray(np.full(SMALL.shape, value, np.int32)).save(tmp_path / "masks" / "0.tif")
    assert f"with the value {value}, expected 0 (shirt) to 3 (boot)" in refused(**options, background="first")


def test_masks_of_one_bit(tmp_path: Path) -> None:
    options = own(tmp_path, [SMALL], classes=("no", "yes"))
    Image.fromarray(SMALL > 1).save(tmp_path / "masks" / "0.png")
    assert np.array_equal(open_(**options, background="first").read(0)[1], SMALL > 1)


def test_grey_images_have_the_channels_of_the_model(tmp_path: Path) -> None:
    options = own(tmp_path, [VALUES]) | {"background": "first"}
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    write(tmp_path / "images" / "0.png", grey)
    assert np.array_equal(open_(**options).read(0)[0], np.stack([grey] * 3, 2))
    assert np.array_equal(open_(**options, channels=1).read(0)[0], grey[..., None])


# ----------------------------------------------------------------------------------------------- refused at the start
def spoil(root: Path, what: str) -> None:
    """Make one thing wrong in a folder of three images and masks."""
    images, masks = root / "train" / "images", root / "train" / "masks"
    if what == "no mask":
        (masks / "1.png").unlink()
        (masks / "2.png").unlink()
    elif what == "no image":
        (images / "1.png").unlink()
    elif what == "empty":
        for path in [*masks.iterdir()]:
            path.unlink()
    elif what == "no folder":
        images.rename(root / "train" / "pictures")
    elif what == "two of a name":
        write(images / "1.jpg", colour((2, 3), 1))
    elif what == "size":
        write(masks / "1.png", np.zeros((3, 2), np.uint8))
    elif what == "colour":
        write(masks / "1.png", colour((2, 3), 1))
        write(masks / "2.png", colour((2, 3), 1))
    elif what == "lossy":
        (masks / "1.png").unlink()
        write(masks / "1.jpg", VALUES)
    elif what == "floats":
        (masks / "1.png").unlink()
        Image.fromarray(VALUES.astype(np.float32)).save(masks / "1.tif")
    elif what == "value":
        write(masks / "2.png", np.full((2, 3), 77, np.uint8))
    elif what == "ignored":
        for path in masks.iterdir():
            write(path, np.full((2, 3), 255, np.uint8))


SPOILT = {
    "no mask": "1.png has no mask of the same name in .*masks .2 of 3 have none.; names must agree",
    "no image": "mask .*1.png has no image of the same name in .*images .1 of 3 have none.",
    "empty": "masks holds no images; expected files",
    "no folder": "images is not there; check the path",
    "two of a name": "1.jpg and .*1.png have one name but for the ending; remove one",
    "size": "image .*1.png has 3 x 2 pixels, its mask 2 x 3 .1 of 3 are like that.; a mask says the class",
    "colour": "mask .*1.png is of 3 channels .RGB. .2 of 3 are like that.; save masks as PNG with one channel",
    "lossy": "mask .*1.jpg is a JPEG, which changes values",
    "floats": "mask .*1.tif is of mode F, no whole numbers",
    "value": r"2.png has a mask, .*2.png, with the value 77, expected 0 \(background\) to 4 \(boot\), and 255 \(ignor",
    "ignored": "3 masks of .* were looked at, and all of their values are ignored, as in .*0.png",
}


@pytest.mark.parametrize("what", SPOILT)
def test_wrong_folders_are_one_line(tmp_path: Path, what: str) -> None:
    spoil(scenes_folder(tmp_path, [VALUES] * 3), what)
    with pytest.raises(UserError, match=SPOILT[what]) as caught:
        open_(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\na\n", "line 3 is 'a' again, as line 1"),
        ("a\n\nb\n", "line 2 is empty"),
        ("\n", "is empty, expected the name of a class"),
        ("".join(f"{k}\n" for k in range(256)), "has 257 classes, expected 255 or fewer"),
        ("\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_wrong_classes_are_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = scenes_folder(tmp_path, [VALUES]) / "classes.txt"
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    assert message in refused(tmp_path)


def test_wrong_flags_are_one_line(tmp_path: Path) -> None:
    options = own(tmp_path / "own", [VALUES])
    scenes_folder(tmp_path, [VALUES])
    assert "--data_path is missing" in refused()
    assert "both --data_path and --train_images are given" in refused(tmp_path, **options, background="first")
    assert "--background is missing: say what value 0" in refused(**options)
    assert "--classes is missing" in refused(**options | {"classes": ""}, background="first")
    assert "--val_images is missing" in refused(split="val", **options, background="first")
    assert "--ignore_index 0 contradicts --background first" in refused(**options, background="first", ignore_index=0)
    assert "has no train/masks and is no ADEChallengeData2016" in refused(tmp_path / "own")
    one = own(tmp_path / "one", [VALUES * 0], classes=("thing",))
    assert "has 1 class, expected 2 or more" in refused(**one, background="first")
    assert open_(**one, background="class").classes == ("background", "thing")


# -------------------------------------------------------------------------------------------------- bad samples
def test_a_sample_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    """Many masks: not all are looked at before."""
    root = scenes_folder(tmp_path, [VALUES] * 40)
    images, masks = root / "train" / "images", root / "train" / "masks"
    write(masks / "1.png", np.full((2, 3), 77, np.uint8))
    (masks / "2.png").write_bytes((masks / "2.png").read_bytes()[:-20])
    (images / "3.png").write_bytes(b"")
    (images / "4.png").write_bytes(b"no image")
    write(masks / "5.png", np.full((2, 3), 255, np.uint8))
    found = open_(root)
    numbers = {Path(found.name(k)).stem: k for k in range(len(found))}
    (images / "6.png").unlink()
    write(masks / "7.png", np.zeros((3, 2), np.uint8))
    write(masks / "8.png", colour((2, 3), 0))
    for stem, message in {
        "1": "with the value 77, expected 0 .background.",
        "2": "2.png, which is damaged or no image",
        "3": "3.png, which is damaged or no image .the file is empty.",
        "4": "4.png, which is damaged or no image",
        "6": "6.png, which cannot be read .No such file",
        "7": "have different sizes, 3 x 2 and 2 x 3 pixels",
        "8": "a mask of 3 channels",
    }.items():
        with pytest.raises(Unreadable, match=message):
            found.read(numbers[stem])
    assert (found.read(numbers["5"])[1] == 255).all()  # wholly ignored, and kept
