"""Preparing data sets: odd images, unreadable files, kills, full disks, checks; and Fashion-MNIST."""

import csv
import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import fashion_mnist, images, verify
from data_prep.encode import WriteOptions
from data_prep.writer import write_beton
from fasthpm.data import build_loader, read_info
from fasthpm.data.ffcv.beton import JPEG, RAW, open_beton
from fasthpm.data.pixels import list_images
from fasthpm.errors import UserError
from fasthpm.files import file_hash
from tests.helpers.data_fixtures import image_folder, jpeg_bytes, picture, prepare

RAW_FLAGS = ("--write_mode", "raw")


def stored(path: Path) -> list[np.ndarray]:
    """The stored images of a set with one image size, uint8 [H, W, C]."""
    beton = open_beton(path)
    size = (int(beton.heights[0]), int(beton.widths[0]))
    loader = build_loader(path, batch_size=4, image_size=size, channels=beton.info.channels, train=False, num_workers=1)
    pixels = [image.numpy() for batch in loader for image in batch.images]
    loader.close()
    return pixels


def one_stored(folder: Path, *flags: str) -> np.ndarray:
    """The single image of `folder`, after preparation."""
    (pixels,) = stored(prepare(folder, folder.parent / "one.beton", *RAW_FLAGS, *flags))
    return pixels


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


# ------------------------------------------------------------------------------------------------------- odd images
def rgba() -> Image.Image:
    image = picture(0).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8), (40, 1))))
    return image


def over_white(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


def test_alpha_is_laid_over_white(folder):
    rgba().save(folder / "a.png")
    assert np.abs(one_stored(folder) - over_white(rgba())).max() <= 1


def test_grey_with_alpha_is_laid_over_white(folder):
    image = Image.merge("LA", (picture(0, grey=True), rgba().getchannel("A")))
    image.save(folder / "a.png")
    assert np.abs(one_stored(folder) - over_white(image)[..., :1]).max() <= 1


def test_palettes_with_and_without_transparency(folder):
    image = picture(0).quantize(16)
    image.save(folder / "a.png")
    assert np.array_equal(one_stored(folder), np.asarray(image.convert("RGB")))
    image.save(folder / "a.png", transparency=3)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == 3] = 255
    assert (np.asarray(image) == 3).any()
    assert np.array_equal(one_stored(folder, "--overwrite"), expected)


def test_cmyk_jpegs_come_out_in_their_colours(folder):
    (folder / "a.jpg").write_bytes(jpeg_bytes(picture(0).convert("CMYK"), subsampling=0))
    assert np.abs(one_stored(folder).astype(int) - np.asarray(picture(0))).mean() < 4


def test_sixteen_bit_grey_is_scaled_not_clipped(folder):
    values = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(np.uint16)
    Image.fromarray(values).save(folder / "a.png")
    assert np.abs(one_stored(folder)[..., 0] - values / 257).max() <= 0.5


def test_sixteen_bit_tiff_of_either_byte_order(folder):
    values = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(">u2")
    Image.frombytes("I;16B", (48, 40), values.tobytes()).save(folder / "a.tif")
    assert np.abs(one_stored(folder)[..., 0] - values / 257).max() <= 0.5


def test_exif_rotation_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "a.jpg").write_bytes(jpeg_bytes(picture(0), exif=exif))
    upright = Image.open(io.BytesIO(jpeg_bytes(picture(0))))
    assert np.array_equal(one_stored(folder), np.asarray(upright.transpose(Image.Transpose.ROTATE_270)))


def test_grey_images_are_stored_as_one_channel(folder):
    picture(0, grey=True).save(folder / "a.png")
    assert np.array_equal(one_stored(folder)[..., 0], np.asarray(picture(0, grey=True)))


def test_one_bit_and_animated_images(folder):
    picture(0, grey=True).convert("1").save(folder / "a.png")
    assert np.array_equal(one_stored(folder)[..., 0] > 0, np.asarray(picture(0, grey=True).convert("1")))
    (folder / "a.png").unlink()
    frames = [picture(k).quantize(32) for k in range(2)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(one_stored(folder, "--overwrite"), np.asarray(frames[0].convert("RGB")))


def test_grey_flag_stores_luma(folder):
    picture(0).save(folder / "a.png")
    assert np.array_equal(one_stored(folder, "--grey")[..., 0], np.asarray(picture(0).convert("L")))


@pytest.mark.parametrize(("size", "expected"), [((40, 100), (20, 50)), ((3, 400), (1, 50)), ((30, 50), (30, 50))])
def test_large_images_are_shrunk_but_never_to_nothing(folder, size, expected):
    picture(0, size).save(folder / "a.png")
    beton = open_beton(prepare(folder, folder.parent / "a.beton", "--max_resolution", "50"))
    assert (beton.heights[0], beton.widths[0]) == expected


# ------------------------------------------------------------------------------------------------------- sources
def test_class_folders_sort_into_labels_and_the_order_is_seeded(tmp_path):
    folder = image_folder(tmp_path / "in", 12)
    (folder / "cat").mkdir()
    (folder / ".hidden").mkdir()
    (folder / "ant" / ".DS_Store").write_bytes(b"x")
    paths = [prepare(folder, tmp_path / f"{k}.beton", *RAW_FLAGS, "--seed", seed) for k, seed in enumerate("001")]
    first, again, other = (open_beton(path) for path in paths)
    assert first.info.classes == ("ant", "bee", "cat")
    assert first.sidecar["counts"] == [6, 6, 0]
    assert first.labels.tolist() == again.labels.tolist() != sorted(first.labels.tolist())
    a, b, c = (stored(path) for path in paths)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))
    truth = {np.asarray(picture(k)).tobytes(): k % 2 for k in range(12)}
    assert [truth[image.tobytes()] for image in a] == first.labels.tolist()
    assert other.sidecar["sha256"] != first.sidecar["sha256"]


def test_flat_folders_have_one_class(folder):
    picture(0).save(folder / "a.png")
    info = read_info(prepare(folder, folder.parent / "a.beton"))
    assert info.classes == ("in",)


@pytest.mark.parametrize(
    ("lines", "labels", "classes"),
    [
        ("a b.png\tdog\nc.png\tcat\n", [1, 0], ("cat", "dog")),
        ("a b.png dog\nc.png cat\n", [1, 0], ("cat", "dog")),
        ("a b.png\t3\n\nc.png\t0\n", [3, 0], ("0", "1", "2", "3")),
        ("a b.png\nc.png\n", [0, 0], ("list",)),
    ],
)
def test_lists_with_labels_names_and_spaces(folder, lines, labels, classes):
    for name in ("a b.png", "c.png"):
        picture(0).save(folder / name)
    (folder / "list.txt").write_text(lines)
    listed = list_images(folder / "list.txt")
    assert [Path(path).name for path in listed.paths] == ["a b.png", "c.png"]
    assert (list(listed.labels), listed.classes) == (labels, classes)
    assert read_info(prepare(folder / "list.txt", folder.parent / "a.beton")).classes == classes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.png\t1\nb.png\n", "line 2 has no label"),
        ("a.png\t9999999\n", "line 1: label 9999999"),
        ("a.png\t1\n../b.png\t1\n", r"names '\.\./b\.png', which lies outside .*; move the list"),
        ("/etc/passwd\t1\n", "names '/etc/passwd', which lies outside"),
    ],
)
def test_bad_lists_are_refused(folder, lines, message):
    (folder / "list.txt").write_text(lines)
    with pytest.raises(UserError, match=message):
        list_images(folder / "list.txt")


def test_ambiguous_and_empty_sources_are_refused(tmp_path):
    folder = image_folder(tmp_path / "in", 2)
    picture(0).save(folder / "loose.png")
    with pytest.raises(UserError, match="both folders and images"):
        prepare(folder, tmp_path / "a.beton")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image files"):
        prepare(tmp_path / "empty", tmp_path / "a.beton")
    with pytest.raises(UserError, match="is not there"):
        prepare(tmp_path / "nowhere", tmp_path / "a.beton")


# ------------------------------------------------------------------------------------------------------- sidecar
def test_sidecar_holds_what_was_measured(tmp_path):
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


def test_write_modes_store_what_they_say(tmp_path):
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


def test_samples_larger_than_ffcvs_page_are_written(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3), dtype=np.uint8)
    out = tmp_path / "big.beton"
    write_beton([(image, 0)], out, ["noise"], options=WriteOptions(write_mode="raw"), num_workers=1)
    assert np.array_equal(stored(out)[0], image)


# ------------------------------------------------------------------------------------------------------- bad files
def spoil(folder: Path) -> dict[str, str]:
    """Put unreadable files of every kind into `folder`: name -> part of the reason."""
    whole = jpeg_bytes(picture(0, (200, 200)))
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not an image")
    (folder / "gone.png").symlink_to("nowhere.png")
    Image.new("1", (5000, 5000)).save(folder / "huge.png")
    Image.fromarray(np.full((4, 4), 1e6, np.float32)).save(folder / "float.tif")
    return {
        "empty.png": "empty",
        "cut.jpg": "Premature end",
        "notes.txt": "cannot identify",
        "gone.png": "No such file",
        "huge.png": "--max_pixels",
        "float.tif": "expected 0 to 1",
    }


def test_without_opencv_one_line_names_the_extra(folder, monkeypatch):
    picture(0).save(folder / "a.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs OpenCV.*pip install 'fasthpm\[ffcv\]'"):
        prepare(folder, folder.parent / "a.beton")
    assert not (folder.parent / "a.beton").exists()


def test_unreadable_files_are_listed_and_left_out(tmp_path):
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
def test_too_many_unreadable_files_fail_the_run(tmp_path, allowed, fails):
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


def test_nothing_readable_is_an_error(folder):
    (folder / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="no readable image"):
        prepare(folder, folder.parent / "a.beton", "--max_rejected", "1")


def test_existing_output_needs_overwrite(tmp_path):
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
def test_wrong_flags_are_one_line(folder, flags, message):
    picture(0).save(folder / "a.png")
    with pytest.raises(UserError, match=message) as error:
        images.main([str(folder), str(folder.parent / flags[0]), *flags[1:]])
    assert "\n" not in str(error.value)
    assert leftovers(folder.parent) == []


# ------------------------------------------------------------------------------------------------------- verify
def test_verify_accepts_a_sound_set_and_catches_one_flipped_byte(tmp_path, capsys):
    out = prepare(image_folder(tmp_path / "in", 6), tmp_path / "set.beton", "--write_mode", "proportion")
    verify.main([str(out)])
    assert "is sound: 6 images" in capsys.readouterr().out
    position = int(open_beton(out).positions[3]) + 10
    with out.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UserError, match="has sha256"):
        verify.main([str(out)])


def test_verify_decodes_every_image(tmp_path):
    out = prepare(image_folder(tmp_path / "in", 6), tmp_path / "set.beton")
    beton, data = open_beton(out), bytearray(out.read_bytes())
    for index in (2, 4):
        start, length = int(beton.positions[index]), int(beton.lengths[index])
        data[start : start + length] = bytes(length)
    out.write_bytes(data)
    sidecar = beton.sidecar | {"sha256": file_hash(out)}
    out.with_suffix(".json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match=r"2 of 6 images do not decode, the first is sample 2 \((ant|bee)/00\d.png\)"):
        verify.main([str(out)])
    out.with_suffix(".json").write_text(json.dumps(sidecar | {"counts": [4, 2]}))
    with pytest.raises(UserError, match="samples per class"):
        verify.main([str(out)])


def test_command_lines_end_with_status_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "data_prep.verify", str(tmp_path / "no.beton")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("fasthpm: error: ")
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- Fashion-MNIST
def small_source(folder: Path, count: int = 40) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """idx files like Fashion-MNIST's, but few and, for val, not compressed."""
    rng, made = np.random.default_rng(0), {}
    folder.mkdir()
    for name in ("train", "t10k"):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        made[name] = (pixels, labels)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            data = (2048 + array.ndim).to_bytes(4, "big") + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            packed = gzip.compress(data) if name == "train" else data
            (folder / f"{name}-{kind}-ubyte{'.gz' if name == 'train' else ''}").write_bytes(packed)
    return made


def test_fashion_mnist_values_are_those_of_the_idx_files(tmp_path, capsys):
    made = small_source(tmp_path / "source")
    flags = [str(tmp_path / "out"), "--source", str(tmp_path / "source")]
    fashion_mnist.main(flags)
    for split, name in (("train", "train"), ("val", "t10k")):
        path = tmp_path / "out" / f"{split}.beton"
        info = read_info(path)
        assert (info.num_samples, info.channels, info.classes) == (40, 1, fashion_mnist.CLASSES)
        pixels, labels = made[name]
        truth = {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)}
        assert [truth[image.tobytes()] for image in stored(path)] == open_beton(path).labels.tolist()
        assert np.allclose(info.mean, pixels.mean() / 255)
    capsys.readouterr()
    before = (tmp_path / "out" / "train.beton").stat().st_mtime_ns
    fashion_mnist.main(flags)
    assert "already" in capsys.readouterr().out
    os.truncate(tmp_path / "out" / "val.beton", 1000)
    fashion_mnist.main(flags)
    assert "wrote" in capsys.readouterr().out
    assert read_info(tmp_path / "out" / "val.beton").num_samples == 40
    assert (tmp_path / "out" / "train.beton").stat().st_mtime_ns == before


def test_fashion_mnist_of_debian_is_read_whole():
    if not fashion_mnist.DEBIAN.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    pixels = fashion_mnist.read_idx(fashion_mnist.DEBIAN, "t10k-images-idx3-ubyte", fashion_mnist.IMAGES_MAGIC)
    labels = fashion_mnist.read_idx(fashion_mnist.DEBIAN, "t10k-labels-idx1-ubyte", fashion_mnist.LABELS_MAGIC)
    assert pixels.shape == (10000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10
    assert abs(pixels.mean() / 255 - 0.2868) < 1e-3


def test_bad_fashion_mnist_sources_are_refused(tmp_path):
    flags = [str(tmp_path / "out"), "--source", str(tmp_path / "source")]
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.main(flags)
    small_source(tmp_path / "source")
    path = tmp_path / "source" / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(UserError, match="cannot be read"):
        fashion_mnist.main(flags)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-50]))
    with pytest.raises(UserError, match="truncated"):
        fashion_mnist.main(flags)
