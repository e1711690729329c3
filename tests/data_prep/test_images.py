"""Preparing images: the sidecar, unreadable files, flags."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep import images, writer
from fasthpm.data import read_info
from fasthpm.data.ffcv.beton import JPEG, RAW, open_beton
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, picture, prepare
from tests.helpers.prepared_sets import RAW_FLAGS, leftovers, spoil


# ------------------------------------------------------------------------------------------------------- sidecar
def test_sidecar_holds_what_was_measured(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", 5, sizes=((40, 48), (64, 20)))
    out = prepare(folder, tmp_path / "set.beton", *RAW_FLAGS)
    sidecar = json.loads((tmp_path / "set.json").read_text())
    pixels = (
        np.concatenate([np.asarray(picture(k, ((40, 48), (64, 20))[k % 2])).reshape(-1, 3) for k in range(5)]) / 255
    )
    assert np.allclose(sidecar["mean"], pixels.mean(0), atol=1e-6)
    assert np.allclose(sidecar["std"], pixels.std(0), atol=1e-6)
    assert (sidecar["num_samples"], sidecar["num_rejected"], sidecar["channels"]) == (5, 0, 3)
    assert (sidecar["max_height"], sidecar["max_width"]) == (64, 48)
    assert sidecar["bytes"] == out.stat().st_size
    assert sidecar["options"]["write_mode"] == "raw"
    assert set(sidecar["versions"]) >= {"fasthpm", "ffcv", "numpy", "pillow"}
    assert sidecar["pixels"] == sum(((40, 48), (64, 20))[k % 2][0] * ((40, 48), (64, 20))[k % 2][1] for k in range(5))
    assert leftovers(tmp_path) == ["set.beton", "set.files.csv", "set.json"]


def test_write_modes_store_what_they_say(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", 16, sizes=((40, 48), (20, 20)))

    def modes(*flags: str) -> list[int]:
        return open_beton(prepare(folder, tmp_path / "a.beton", "--overwrite", *flags)).modes.tolist()

    assert set(modes()) == {JPEG}
    assert set(modes(*RAW_FLAGS)) == {RAW}
    mixed = modes("--write_mode", "proportion")
    assert 2 <= sum(mode == JPEG for mode in mixed) <= 14
    assert mixed == modes("--write_mode", "proportion")
    beton = open_beton(
        prepare(folder, tmp_path / "a.beton", "--overwrite", "--write_mode", "smart", "--smart_threshold", "2000")
    )
    assert ((beton.modes == JPEG) == (beton.heights == 40)).all()


# ------------------------------------------------------------------------------------------------------- bad files
def test_without_opencv_one_line_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(0).save(folder / "a.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs OpenCV.*pip install 'fasthpm\[ffcv\]'"):
        prepare(folder, folder.parent / "a.beton")
    assert not (folder.parent / "a.beton").exists()


def test_unreadable_files_are_listed_and_left_out(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", 6)
    reasons = spoil(folder / "ant")
    prepare(folder, tmp_path / "set.beton", "--max_rejected", "6", "--max_pixels", "1000000")
    with (tmp_path / "set.rejected.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["path"]).name for row in rows} == set(reasons)
    for row in rows:
        assert reasons[Path(row["path"]).name] in row["reason"]
    sidecar = open_beton(tmp_path / "set.beton").sidecar
    assert (sidecar["num_samples"], sidecar["num_rejected"], sidecar["counts"]) == (6, 6, [3, 3])
    for name in reasons:
        (folder / "ant" / name).unlink()
    prepare(folder, tmp_path / "set.beton", "--overwrite")
    assert not (tmp_path / "set.rejected.csv").exists()


@pytest.mark.parametrize(("allowed", "fails"), [("0", True), ("0.2", True), ("0.5", False), ("5", True), ("6", False)])
def test_too_many_unreadable_files_fail_the_run(tmp_path: Path, allowed: str, fails: bool) -> None:
    folder = image_folder(tmp_path / "in", 6)
    spoil(folder / "ant")
    flags = ("--max_rejected", allowed, "--max_pixels", "1000000")
    if fails:
        with pytest.raises(UserError, match=r"6 of 12 images cannot be read.*rejected\.csv"):
            prepare(folder, tmp_path / "set.beton", *flags)
    else:
        prepare(folder, tmp_path / "set.beton", *flags)
    written = [] if fails else ["set.beton", "set.files.csv", "set.json"]
    assert leftovers(tmp_path) == [*written, "set.rejected.csv"]


def test_nothing_readable_is_an_error(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="no readable image"):
        prepare(folder, folder.parent / "a.beton", "--max_rejected", "1")


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", 2)
    out = prepare(folder, tmp_path / "a.beton")
    before = out.read_bytes()
    prepare(folder, out)  # the same again: nothing to do
    assert out.read_bytes() == before
    image_folder(folder, 4)
    with pytest.raises(UserError, match="use --overwrite"):
        prepare(folder, out)
    spoil(folder / "ant")
    with pytest.raises(UserError, match="cannot be read"):
        prepare(folder, out, "--overwrite")
    assert out.read_bytes() == before  # a run that fails leaves the old set alone
    assert read_info(out).num_samples == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a.beton", "--jpeg_quality", "0"), "jpeg_quality is 0"),
        (("a.beton", "--write_mode", "zip"), "invalid choice: 'zip'"),
        (("a.beton", "--max_rejected", "-1"), "max_rejected -1"),
        (("a.beton", "--preset", "300"), "invalid choice: '300'"),
        (("a.beton", "--shards", "2"), "--shards 2 is more than the 1 images"),
        (("a.beton", "--val_fraction", "1.5"), "--val_fraction 1.5 of 1 images is 2"),
        (("a.beton", "--val_count", "1", "--val_fraction", ".5"), "not allowed with"),
        (("a.beton", "--classes", "no.txt"), "class list no.txt cannot be read"),
        (("a.beton", "--max_pixels", "0"), "max_pixels is 0"),
        ((f"{'x' * 249}.beton",), "bytes too long"),
        (("a.beton", "--jpeg_qualty", "9"), "did you mean '--jpeg_quality'"),
        (("a.bin",), "does not end in .beton"),
        (("no/a.beton",), "does not exist; create it"),
    ],
)
def test_wrong_flags_are_one_line(folder: Path, flags: tuple[str, ...], message: str) -> None:
    picture(0).save(folder / "a.png")
    with pytest.raises(UserError, match=message) as error:
        images.main([str(folder), str(folder.parent / flags[0]), *flags[1:]])
    assert "\n" not in str(error.value)
    assert leftovers(folder.parent) == []


@pytest.mark.parametrize("flag", ["--val_fraction", "--max_rejected", "--compress_probability"])
def test_nan_and_inf_are_refused_before_any_work(folder: Path, flag: str) -> None:
    for value in ("nan", "inf"):
        with pytest.raises(UserError, match=f"{flag[2:]} is {value}, expected a finite number"):
            images.main([str(folder), str(folder.parent / "a.beton"), flag, value])


@pytest.mark.parametrize("name", ["a.beton", "a.json", "a.files.csv", "a.rejected.csv", "a_val.beton", ".a.partial"])
def test_an_output_that_cannot_be_written_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = image_folder(tmp_path / "in", 8)
    if name == ".a.partial":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(writer, "append_all", None)  # no work
    with pytest.raises(UserError, match=re.escape(name)) as error:
        prepare(folder, tmp_path / "a.beton", "--overwrite", "--val_fraction", ".5")
    assert "\n" not in str(error.value)


def test_an_output_within_the_source_is_never_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(4):
        picture(index).save(tmp_path / f"{index}.png")
    (tmp_path / "bad.jpg").touch()
    out = tmp_path / "set.beton"
    with pytest.raises(UserError, match="1 of 5 images cannot be read"):
        prepare(tmp_path, out)
    prepare(tmp_path, out, "--max_rejected", "1")
    prepare(tmp_path, out, "--max_rejected", "5")
    shown = capsys.readouterr().out
    assert shown.count("5 images, 1 classes") == 3
    assert "left out, FastHPM's own: 4 (set.beton, set.files.csv, set.json, …)" in shown
    assert "nothing to do" in shown


MODES = {"jpg": [], "raw": ["--write_mode", "raw"], "raw256": ["--preset", "raw256"]}
MODES |= {mode: ["--write_mode", mode] for mode in ("smart", "proportion")}
FOR_MODES = {  # where a flag of storage has an effect
    "--smart_threshold 9": {"smart"},
    "--compress_probability .3": {"proportion"},
    "--jpeg_quality 80": {"jpg", "smart", "proportion"},
    "--keep_jpeg": {"jpg", "smart", "proportion"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("words", FOR_MODES)
def test_flags_of_another_write_mode_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    """Every flag of storage with every mode: where it is refused nothing is listed, elsewhere it goes on."""
    monkeypatch.setattr(images, "open_source", lambda *_, **__: (_ for _ in ()).throw(LookupError("listed")))
    flags = [str(tmp_path), str(tmp_path / "a.beton"), *MODES[mode], *words.split()]
    if mode in FOR_MODES[words]:
        with pytest.raises(LookupError, match="listed"):
            images.main(flags)
    else:
        with pytest.raises(UserError, match=f"{words.split()[0]} has no effect here: "):
            images.main(flags)


# ------------------------------------------------------------------------------------------------------- presets
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), (500, 90, "jpg")),
        (("--preset", "imagenet_400"), (400, 90, "jpg")),
        (("--preset", "256"), (256, 90, "jpg")),
        (("--preset", "raw256"), (256, 90, "raw")),
        (("--preset", "raw256", "--max_resolution", "0"), (0, 90, "raw")),
        (("--preset", "400", "--write_mode", "smart", "--jpeg_quality", "70"), (400, 70, "smart")),
    ],
)
def test_presets_and_flags_that_override_them(flags: tuple[str, ...], expected: tuple[int, int, str]) -> None:
    options = images._options(images.build_parser().parse_args(["in", "a.beton", *flags]))
    assert (options.max_resolution, options.jpeg_quality, options.write_mode) == expected
