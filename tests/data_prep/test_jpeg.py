"""JPEG files that are stored as they are, and what strict decoding finds."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import encode, jpeg, verify
from data_prep.encode import WriteOptions
from data_prep.sets import read_csv
from fasthpm.data import jpegs
from fasthpm.data.ffcv.beton import JPEG, open_beton
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import jpeg_bytes, picture, prepare
from tests.helpers.odd_files import without_segments
from tests.helpers.prepared_sets import KEEP, blobs, jpeg_folder, named


def test_jpegs_that_fit_are_stored_untouched(tmp_path: Path) -> None:
    made = jpeg_folder(tmp_path / "in", 6)
    out = prepare(tmp_path / "in", tmp_path / "a.beton", "--keep_jpeg")
    assert blobs(out) == [made[name] for name in named(out)]
    sidecar = open_beton(out).sidecar
    assert sidecar["kept_jpegs"] == 6
    pixels = np.concatenate([np.asarray(Image.open(io.BytesIO(data))).reshape(-1, 3) for data in made.values()]) / 255
    assert np.allclose(sidecar["mean"], pixels.mean(0), atol=2e-3)
    assert np.allclose(sidecar["std"], pixels.std(0), atol=2e-3)
    verify.main([str(out)])


def upside_down() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"progressive": True}, KEEP),
        ({"exif": upside_down()}, KEEP),
        ({"comment": b"x" * 60_000}, KEEP),  # more than a byte per pixel
        ({}, ()),
        ({}, (*KEEP, "--grey")),
        ({}, (*KEEP, "--max_resolution", "79")),
        ({}, ("--write_mode", "raw")),
    ],
)
def test_jpegs_that_do_not_fit_are_encoded_anew(
    tmp_path: Path, options: dict[str, Any], flags: tuple[str, ...]
) -> None:
    made = jpeg_folder(tmp_path / "in", 2, **options)
    out = prepare(tmp_path / "in", tmp_path / "a.beton", *flags)
    beton = open_beton(out)
    assert beton.sidecar["kept_jpegs"] == 0
    assert not set(blobs(out)) & set(made.values())
    for data, mode in zip(blobs(out), beton.modes, strict=True):
        assert mode != JPEG or jpegs.frame_type(data) == 0xC0
    verify.main([str(out)])


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_strict_decoding_agrees_with_pil(subsampling: int) -> None:
    data = jpeg_bytes(picture(1, (97, 130)), subsampling=subsampling)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(jpegs.decode(data, 130, 97) - expected).max() <= 2


def test_strict_decoding_finds_what_pil_passes_over(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    made = jpeg_folder(folder, 4)
    data = bytearray(made["ant/000.jpg"])
    middle = len(data) // 2
    data[middle : middle + 8] = b"\xff\xd9" * 4  # an end where there is none
    (folder / "ant" / "000.jpg").write_bytes(data)
    Image.open(io.BytesIO(data)).load()
    out = prepare(folder, tmp_path / "a.beton", "--max_rejected", "1")
    ((path, reason),) = list(read_csv(tmp_path / "a.rejected.csv"))[1:]
    assert (Path(path).name, reason.split(":")[0]) == ("000.jpg", "DamagedJpeg")
    assert open_beton(out).info.num_samples == 3


def test_harmless_warnings_are_no_damage(tmp_path: Path) -> None:
    """Stray bytes between segments: libjpeg warns, the pixels are whole; stored anew, so that reading does not warn."""
    data = jpeg_bytes(picture(0, (64, 80)))
    at = data.index(b"\xff\xdb")
    odd = data[:at] + b"\0\0\0" + data[at:]
    with pytest.raises(jpegs.OddJpeg):
        jpegs.decode(odd, 80, 64)
    stored = encode.encode(odd, WriteOptions(), 0.0)
    assert not stored.kept
    jpegs.decode(stored.blob, 80, 64)


def unlike(seed: int, **options: Any) -> bytes:
    return jpeg_bytes(picture(seed, (64, 80)), **options)


def test_what_is_kept_decodes_in_training_and_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    """Photos with tables of their own, frames that rely on the standard ones, tiles that rely on the file they left."""
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(3):
        (folder / f"photo{k}.jpg").write_bytes(unlike(k, optimize=True))
        (folder / f"frame{k}.jpg").write_bytes(without_segments(unlike(9 + k), 0xC4))
        (folder / f"tile{k}.jpg").write_bytes(without_segments(unlike(20 + k), 0xC4, 0xDB))
    flags = ("--max_rejected", "3", "--keep_jpeg")
    out, other = (prepare(folder, tmp_path / f"{n}.beton", *flags, "--num_workers", str(n)) for n in (1, 2))
    assert out.read_bytes() == other.read_bytes()
    assert open_beton(out).sidecar["kept_jpegs"] == 3
    rejected = list(read_csv(tmp_path / "1.rejected.csv"))[1:]
    assert [Path(path).name for path, _ in rejected] == [f"tile{k}.jpg" for k in range(3)]
    assert {reason for _, reason in rejected} == {"DamagedJpeg: Quantization table 0x00 was not defined"}
    verify.main([str(out)])
    for name, data in zip(named(out), blobs(out), strict=True):
        assert jpeg.fits(data)
        truth = Image.open(io.BytesIO((folder / name).read_bytes() if "photo" in name else unlike(9 + int(name[-5]))))
        assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - np.asarray(truth)).mean() < 4


def test_verify_decodes_every_image_alone(tmp_path: Path) -> None:
    """A set with a tile, as earlier versions wrote it: no neighbour lends its tables."""
    folder = tmp_path / "in"
    jpeg_folder(folder, 6)
    out = prepare(folder, tmp_path / "a.beton", "--keep_jpeg")
    beton, data = open_beton(out), bytearray(out.read_bytes())
    start, length = int(beton.positions[3]), int(beton.lengths[3])
    data[start : start + length] = without_segments(blobs(out)[3], 0xC4, 0xDB).ljust(length, b"\0")
    out.write_bytes(data)
    with pytest.raises(UserError, match="1 of 6 images do not decode, the first is sample 3"):
        verify._check_pixels(beton, 1)
