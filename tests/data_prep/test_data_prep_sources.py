"""Sources other than plain folders; which samples are taken, how they are split and stored; FFCV reads the result."""

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import encode, images, jpeg, sources, verify
from data_prep.encode import WriteOptions
from data_prep.plan import stored_order
from data_prep.sets import files_path, members, read_csv, read_index
from data_prep.sources import open_source
from fasthpm.data.ffcv.beton import JPEG, open_beton
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, jpeg_bytes, picture, prepare


def blobs(path: Path) -> list[bytes]:
    """The stored bytes of every sample of a set."""
    found = []
    for member in members(path):
        beton, data = open_beton(member), member.read_bytes()
        spans = zip(beton.positions.tolist(), beton.lengths.tolist(), strict=True)
        found += [data[start : start + length] for start, length in spans]
    return found


def named(path: Path) -> list[str]:
    """The sources of a set's samples."""
    return [row[0] for member in members(path) for row in list(read_csv(files_path(member)))[1:]]


def jpeg_folder(folder: Path, count: int, **options: object) -> dict[str, bytes]:
    """`count` JPEG files in class folders ant and bee: name -> bytes."""
    made = {}
    for index in range(count):
        name = f"{('ant', 'bee')[index % 2]}/{index:03d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        made[name] = jpeg_bytes(picture(index, (64, 80)), **options)
        (folder / name).write_bytes(made[name])
    return made


# ------------------------------------------------------------------------------------------------------- JPEGs kept
def test_jpegs_that_fit_are_stored_untouched(tmp_path):
    made = jpeg_folder(tmp_path / "in", 6)
    out = prepare(tmp_path / "in", tmp_path / "a.beton", "--keep_jpeg")
    assert blobs(out) == [made[name] for name in named(out)]
    sidecar = open_beton(out).sidecar
    assert sidecar["kept_jpegs"] == 6
    pixels = np.concatenate([np.asarray(Image.open(io.BytesIO(data))).reshape(-1, 3) for data in made.values()]) / 255
    assert np.allclose(sidecar["mean"], pixels.mean(0), atol=2e-3)
    assert np.allclose(sidecar["std"], pixels.std(0), atol=2e-3)
    verify.main([str(out)])


KEEP = ("--keep_jpeg",)


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
        ({}, (*KEEP, "--write_mode", "raw")),
    ],
)
def test_jpegs_that_do_not_fit_are_encoded_anew(tmp_path, options, flags):
    made = jpeg_folder(tmp_path / "in", 2, **options)
    out = prepare(tmp_path / "in", tmp_path / "a.beton", *flags)
    beton = open_beton(out)
    assert beton.sidecar["kept_jpegs"] == 0
    assert not set(blobs(out)) & set(made.values())
    for data, mode in zip(blobs(out), beton.modes, strict=True):
        assert mode != JPEG or jpeg.frame_type(data) == 0xC0
    verify.main([str(out)])


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_strict_decoding_agrees_with_pil(subsampling):
    data = jpeg_bytes(picture(1, (97, 130)), subsampling=subsampling)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(jpeg.decode(data, 130, 97) - expected).max() <= 2


def test_strict_decoding_finds_what_pil_passes_over(tmp_path):
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


def test_harmless_warnings_are_no_damage(tmp_path):
    """Stray bytes between segments: libjpeg warns, the pixels are whole; stored anew, so that reading does not warn."""
    data = jpeg_bytes(picture(0, (64, 80)))
    at = data.index(b"\xff\xdb")
    odd = data[:at] + b"\0\0\0" + data[at:]
    with pytest.raises(jpeg.OddJpeg):
        jpeg.decode(odd, 80, 64)
    stored = encode.encode(odd, WriteOptions(), 0.0)
    assert not stored.kept
    jpeg.decode(stored.blob, 80, 64)


def test_large_jpegs_are_halved_while_decoding_and_look_the_same(tmp_path):
    assert [jpeg.reduction(side, 500) for side in (1000, 1999, 2000, 4000, 40000)] == [0, 0, 1, 2, 3]
    assert jpeg.reduction(4000, 0) == 0
    data = jpeg_bytes(picture(3, (1200, 1601)))
    quick = encode.encode(data, WriteOptions(max_resolution=200, write_mode="raw"), 0.0)
    slow = encode.encode(Image.open(io.BytesIO(data)), WriteOptions(max_resolution=200, write_mode="raw"), 0.0)
    assert (quick.height, quick.width) == (slow.height, slow.width) == (149, 200)
    difference = np.frombuffer(quick.blob, np.uint8).astype(int) - np.frombuffer(slow.blob, np.uint8)
    assert np.abs(difference).mean() < 0.6


def test_sums_are_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (301, 407, 3), dtype=np.uint8)
    sums, squares = encode.measure(pixels)
    flat = pixels.reshape(-1, 3).astype(np.int64)
    assert (list(sums), list(squares)) == (flat.sum(0).tolist(), (flat**2).sum(0).tolist())


def test_images_too_large_are_rejected_by_their_header(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.frombytes("1", (20000, 20000), bytes(20000 * 2500)).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="20000 x 20000 pixels, more than --max_pixels 100000000"):
        encode.encode(buffer.getvalue(), WriteOptions(), 0.0)


# ------------------------------------------------------------------------------------------------------- presets
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), (500, 90, "jpg")),
        (("--preset", "imagenet_400"), (400, 90, "jpg")),
        (("--preset", "256"), (256, 90, "jpg")),
        (("--preset", "raw256"), (256, 90, "raw")),
        (("--preset", "raw256", "--max_resolution", "0"), (0, 90, "raw")),
        (("--preset", "400", "--write_mode", "raw", "--jpeg_quality", "70"), (400, 70, "raw")),
    ],
)
def test_presets_and_flags_that_override_them(flags, expected):
    options = images._options(images.build_parser().parse_args(["in", "a.beton", *flags]))
    assert (options.max_resolution, options.jpeg_quality, options.write_mode) == expected


# ------------------------------------------------------------------------------------------------------- shards
def test_the_union_of_shards_is_the_single_set(tmp_path):
    folder = image_folder(tmp_path / "in", 11, sizes=((40, 48), (64, 20)))
    (folder / "ant" / "bad.png").write_bytes(b"x")
    flags = ("--max_rejected", "1")
    single = prepare(
        folder, tmp_path / "one" / "a.beton" if (tmp_path / "one").mkdir() else tmp_path / "one/a.beton", *flags
    )
    (tmp_path / "many").mkdir()
    many = prepare(folder, tmp_path / "many" / "a.beton", "--shards", "3", *flags)
    assert not many.exists()
    assert [path.name for path in members(many)] == [f"a-0000{k}-of-00003.beton" for k in range(3)]
    assert blobs(many) == blobs(single)
    assert named(many) == named(single)
    index, sidecar = read_index(many), open_beton(single).sidecar
    for name in ("num_samples", "num_rejected", "channels", "mean", "std", "classes", "counts", "pixels"):
        assert index[name] == sidecar[name], name
    verify.main([str(many)])


def test_verify_finds_an_index_that_does_not_fit(tmp_path):
    many = prepare(image_folder(tmp_path / "in", 8), tmp_path / "a.beton", "--shards", "2")
    index = read_index(many)
    for name, wrong in [("counts", [5, 3]), ("mean", [0.1, 0.1, 0.1]), ("classes", ["a", "b"]), ("num_samples", 9)]:
        many.with_suffix(".json").write_text(json.dumps(index | {name: wrong}))
        with pytest.raises(UserError, match=name):
            verify.main([str(many)])
    many.with_suffix(".json").write_text(json.dumps(index | {"shards": ["../a.beton"]}))
    with pytest.raises(UserError, match="names the shard"):
        verify.main([str(many)])


def test_verify_checks_the_list_of_files(tmp_path):
    out = prepare(image_folder(tmp_path / "in", 4), tmp_path / "a.beton")
    lines = files_path(out).read_text().splitlines(keepends=True)
    for wrong, words in [
        (lines[:-1], "lists 3 files"),
        (lines[1:], "line 1"),
        ([*lines[:2], "a,b\n", *lines[3:]], "line 3"),
    ]:
        files_path(out).write_text("".join(wrong))
        with pytest.raises(UserError, match=words):
            verify.main([str(out)])
    files_path(out).unlink()  # older sets have none
    verify.main([str(out)])


def test_a_sharded_set_replaces_a_single_one_and_back(tmp_path):
    folder, out = image_folder(tmp_path / "in", 6), tmp_path / "a.beton"
    prepare(folder, out)
    prepare(folder, out, "--shards", "2", "--overwrite")
    assert not out.exists()
    with pytest.raises(UserError, match="use --overwrite"):
        prepare(folder, out)
    prepare(folder, out, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a.beton", "a.files.csv", "a.json"]


def test_all_files_of_a_job_have_as_many_channels(tmp_path):
    folder = image_folder(tmp_path / "in", 8, grey=True)
    picture(0).save(folder / "ant" / "colour.png")
    for seed in "012":  # the colours are in different files
        flags = ("--shards", "3", "--val_count", "2", "--seed", seed, "--overwrite")
        out = prepare(folder, tmp_path / "a.beton", *flags)
        sets = [*members(out), tmp_path / "a_val.beton"]
        assert {open_beton(path).info.channels for path in sets} == {3}


# ------------------------------------------------------------------------------------------------------- selection
def test_a_class_list_selects_and_orders(tmp_path):
    folder = image_folder(tmp_path / "in", 8)
    (folder / "cat").mkdir()
    (tmp_path / "classes.txt").write_text("cat\nbee\n")
    out = prepare(folder, tmp_path / "a.beton", "--classes", str(tmp_path / "classes.txt"))
    beton = open_beton(out)
    assert (beton.info.classes, beton.sidecar["counts"]) == (("cat", "bee"), [0, 4])
    assert {name.split("/")[0] for name in named(out)} == {"bee"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("ant\nbees\n", r"1 of 2 classes .* 'bees'; did you mean 'bee'"),
        ("ant\nant\n", "names 'ant' twice"),
        ("\n", "names no class"),
    ],
)
def test_bad_class_lists_are_refused(tmp_path, lines, words):
    (tmp_path / "classes.txt").write_text(lines)
    with pytest.raises(UserError, match=words):
        prepare(image_folder(tmp_path / "in", 4), tmp_path / "a.beton", "--classes", str(tmp_path / "classes.txt"))


def test_validation_splits_are_seeded_stratified_and_disjoint(tmp_path):
    folder = image_folder(tmp_path / "in", 30)
    for index in range(10):
        (folder / "ant" / f"more{index}.png").write_bytes((folder / "ant" / "000.png").read_bytes())
    source = open_source(str(folder))

    def drawn(**flags: float) -> np.ndarray:
        return images.draw_validation(source, flags.get("fraction"), flags.get("count"), int(flags.get("seed", 0)))

    assert np.bincount(source.labels[drawn(fraction=0.2)]).tolist() == [5, 3]
    assert np.bincount(source.labels[drawn(count=9)]).tolist() in ([6, 3], [5, 4])
    assert (drawn(count=9) == drawn(count=9)).all()
    assert (drawn(count=9) != drawn(count=9, seed=1)).any()
    out = prepare(folder, tmp_path / "a.beton", "--val_fraction", "0.2")
    train, val = named(out), named(tmp_path / "a_val.beton")
    assert (len(train), len(val)) == (32, 8)
    assert sorted(train + val) == sorted(source.names)
    verify.main([str(tmp_path / "a_val.beton")])
    whole = prepare(folder, tmp_path / "b.beton")
    assert [name for name in named(whole) if name in set(train)] == train  # the order is the whole set's


# ------------------------------------------------------------------------------------------------------- names
def test_names_of_any_kind(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    names = [
        b"caf\xc3\xa9/\xf0\x9f\x90\x9c.png",
        b"not \xff utf-8/\xfe\xff.png",
        b"x" * 255 + b"/" + b"y" * 251 + b".png",
    ]
    names += [b'com,ma "quoted"/a,b"c.png', b"new\nline/new\nline.png"]
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    for name in names:
        os.makedirs(os.path.dirname(os.path.join(folder, name)))
        with open(os.path.join(folder, name), "wb") as file:
            file.write(buffer.getvalue())
    with open(os.path.join(folder, b"not \xff utf-8/\xfd.png"), "wb"):
        pass
    out = prepare(tmp_path / "in", tmp_path / "a.beton", "--max_rejected", "1")
    assert sorted(map(os.fsencode, named(out))) == sorted(names)
    beton = open_beton(out)
    folders = [os.fsencode(name).split(b"/")[0] for name in named(out)]
    assert [os.fsencode(beton.info.classes[label]) for label in beton.labels] == folders
    ((rejected, _),) = list(read_csv(tmp_path / "a.rejected.csv"))[1:]
    assert os.fsencode(rejected).endswith(b"/\xfd.png")
    verify.main([str(out)])


def test_a_terminal_without_unicode_can_show_everything(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff in")
    image_folder(folder, 2)
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-m", "data_prep.images", str(folder), str(tmp_path / "a.beton")]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"2 images" in done.stdout


def test_links_that_loop_or_lead_nowhere(tmp_path):
    folder = image_folder(tmp_path / "in", 4)
    (folder / "ant" / "loop").symlink_to(folder / "ant")
    (folder / "bee" / "up").symlink_to(folder / "bee" / "down")
    (folder / "bee" / "down").symlink_to(folder / "bee" / "up")
    (folder / "cat").symlink_to(folder / "ant")  # a link to another class folder is the user's business
    out = prepare(folder, tmp_path / "a.beton", "--max_rejected", "2")
    assert open_beton(out).sidecar["counts"] == [2, 2, 2]
    rejected = {Path(path).name for path, _ in list(read_csv(tmp_path / "a.rejected.csv"))[1:]}
    assert rejected == {"up", "down"}


def test_no_images_at_all(tmp_path):
    (tmp_path / "in" / "ant").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no image files"):
        prepare(tmp_path / "in", tmp_path / "a.beton")


# ------------------------------------------------------------------------------------------------------- tar shards
def write_tars(folder: Path, count: int, labels: str = "number") -> dict[str, tuple[bytes, int]]:
    """`count` samples in two shards, by webdataset's own writer: stem -> image file and label."""
    writer = pytest.importorskip("webdataset.writer", reason="webdataset is not installed")
    folder.mkdir()
    made = {}
    for shard in range(2):
        with writer.TarWriter(str(folder / f"train-{shard:04d}.tar")) as tar:
            for index in range(shard, count, 2):
                data = jpeg_bytes(picture(index, (64, 80)))
                made[f"{index:06d}"] = (data, index % 3)
                label = index % 3 if labels == "number" else ("bee", "cat", "ant")[index % 3]
                tar.write({"__key__": f"{index:06d}", "jpg": data, "cls": str(label).encode(), "json": b"{}"})
    return made


@pytest.mark.parametrize("how", ["folder", "glob", "braces"])
def test_tar_shards_of_webdataset(tmp_path, how):
    made = write_tars(tmp_path / "in", 10)
    name = {"folder": "", "glob": "train-*.tar", "braces": "train-{0000..0001}.tar"}[how]
    out = prepare(tmp_path / "in" / name, tmp_path / "a.beton", *KEEP)
    beton = open_beton(out)
    assert beton.info.classes == ("0", "1", "2")
    stems = [Path(name).stem for name in named(out)]
    assert sorted(stems) == sorted(made)
    assert blobs(out) == [made[stem][0] for stem in stems]
    assert beton.labels.tolist() == [made[stem][1] for stem in stems]
    assert named(out)[0].startswith("train-000")


def test_tar_shards_with_class_names_and_odd_samples(tmp_path):
    write_tars(tmp_path / "in", 6, labels="name")
    writer = pytest.importorskip("webdataset.writer", reason="webdataset is not installed")
    with writer.TarWriter(str(tmp_path / "in" / "train-0002.tar")) as tar:
        tar.write({"__key__": "nolabel", "jpg": jpeg_bytes(picture(0))})
        tar.write({"__key__": "noimage", "cls": b"ant"})
        tar.write({"__key__": "broken", "jpg": b"x", "cls": b"ant"})
    out = prepare(tmp_path / "in", tmp_path / "a.beton", "--max_rejected", "3")
    assert open_beton(out).info.classes == ("ant", "bee", "cat")
    reasons = {Path(path).stem: why for path, why in list(read_csv(tmp_path / "a.rejected.csv"))[1:]}
    assert "no label" in reasons["nolabel"]
    assert "none of its members is an image" in reasons["noimage"]
    assert "cannot identify" in reasons["broken"]
    (tmp_path / "classes.txt").write_text("cat\nant\n")
    flags = ("--max_rejected", "3", "--classes", str(tmp_path / "classes.txt"))
    assert open_beton(prepare(tmp_path / "in", tmp_path / "b.beton", *flags)).sidecar["counts"] == [2, 2]


def test_damaged_and_missing_tar_shards_are_one_line(tmp_path):
    write_tars(tmp_path / "in", 6)
    path = tmp_path / "in" / "train-0001.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    for length in (last.offset_data + 1, last.offset + 100, last.offset, 700, 0):  # in data, in a header, before one
        os.truncate(path, length)
        with pytest.raises(UserError, match=r"train-0001\.tar is no plain \.tar file, or is damaged"):
            prepare(tmp_path / "in", tmp_path / "a.beton")
    with pytest.raises(UserError, match=r"train-0007\.tar is not there"):
        prepare(tmp_path / "in" / "train-{0007..0008}.tar", tmp_path / "a.beton")


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    write_tars(tmp_path / "tar", 2)
    write_parquet(tmp_path / "parquet", 4)
    for name, package in (("webdataset", "webdataset"), ("parquet", "pyarrow")):
        monkeypatch.setitem(sys.modules, package, None)
        folder = tmp_path / {"webdataset": "tar", "parquet": "parquet"}[name]
        for module in [m for m in sys.modules if m.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, module)
        with pytest.raises(UserError, match=rf"pip install 'fasthpm\[{name}\]'"):
            open_source(str(folder))


# ------------------------------------------------------------------------------------------------------- parquet
def write_parquet(folder: Path, count: int, *, described: bool = True, split: str = "train") -> dict[bytes, int]:
    """`count` rows in two files of small row groups, laid out and described as Hugging Face does: bytes -> label."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True, exist_ok=True)
    made = [(jpeg_bytes(picture(index, (64, 80))), index % 3) for index in range(count)]
    features = {"image": {"_type": "Image"}, "label": {"names": ["cow", "ape", "bat"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if described else None
    kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for k in range(2):
        rows = made[k * count // 2 : (k + 1) * count // 2]
        table = pa.table(
            {
                "image": pa.array([{"bytes": data, "path": "x.jpg"} for data, _ in rows], kinds),
                "label": pa.array([label for _, label in rows], pa.int64()),
            }
        ).replace_schema_metadata(metadata)
        pq.write_table(table, folder / "data" / f"{split}-{k:05d}-of-00002.parquet", row_group_size=3)
    return dict(made)


@pytest.mark.parametrize(("described", "classes"), [(True, ("cow", "ape", "bat")), (False, ("0", "1", "2"))])
def test_parquet_files_of_hugging_face(tmp_path, described, classes):
    made = write_parquet(tmp_path / "in", 20, described=described)
    out = prepare(tmp_path / "in", tmp_path / "a.beton", *KEEP)
    beton = open_beton(out)
    assert beton.info.classes == classes
    assert sorted(blobs(out)) == sorted(made)
    assert beton.labels.tolist() == [made[data] for data in blobs(out)]
    rows = [name.split("#") for name in named(out)]
    assert sorted((name, int(row)) for name, row in rows) == [
        (f"train-{k:05d}-of-00002.parquet", row) for k in range(2) for row in range(10)
    ]
    groups = [(name, int(row) // 3) for name, row in rows]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(groups))
    assert runs == len(set(groups)) == 8  # each row group is read once
    assert groups != sorted(groups)


def test_parquet_splits_and_columns_must_be_chosen(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    write_parquet(tmp_path / "in", 4)
    write_parquet(tmp_path / "in", 4, split="validation")
    with pytest.raises(UserError, match=r"splits train, validation; name one by a pattern"):
        prepare(tmp_path / "in", tmp_path / "a.beton")
    pattern = tmp_path / "in" / "data" / "validation-*.parquet"
    assert open_beton(prepare(pattern, tmp_path / "a.beton")).info.num_samples == 4
    with pytest.raises(UserError, match=r"columns image, label; expected one of images"):
        prepare(pattern, tmp_path / "b.beton", "--label_column", "fine")
    (tmp_path / "in" / "data" / "validation-00000-of-00002.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        prepare(pattern, tmp_path / "b.beton")


def test_samples_that_belong_together_stay_together(tmp_path):
    class Grouped:
        groups = np.repeat(np.arange(10), 7)

        def __len__(self) -> int:
            return 70

    order = stored_order(Grouped(), 0)
    assert sorted(order.tolist()) == list(range(70))
    runs = Grouped.groups[order].reshape(10, 7)
    assert (runs == runs[:, :1]).all()
    assert runs[:, 0].tolist() != sorted(runs[:, 0])
    assert any(np.diff(piece).min() < 0 for piece in order.reshape(10, 7))


@pytest.mark.parametrize("texts", [["3", "0"], ["b", "a"], ["1", "", "0"]])
def test_labels_are_numbered(texts):
    labels, classes = sources.number_labels(texts)
    assert [classes[label] if label >= 0 else "" for label in labels] == texts


# ------------------------------------------------------------------------------------------------------- FFCV itself
FFCV = """
import json, sys
import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.loader import Loader
from ffcv.reader import Reader
reader = Reader(sys.argv[1])
pipelines = {"image": [CenterCropRGBImageDecoder((40, 48), 1.0)], "label": [IntDecoder()]}
batches = Loader(sys.argv[1], batch_size=4, num_workers=1, os_cache=sys.argv[2] == "True", pipelines=pipelines,
                 drop_last=False)
labels = [label for _, part in batches for label in np.array(part).ravel().tolist()]
print(json.dumps([int(reader.num_samples), int(reader.page_size), reader.metadata["f1"].tolist(), labels]))
"""


@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcvs_own_loader_reads_what_we_write(tmp_path, os_cache):
    """In a process of its own, for it changes numba's types for all."""
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    folder = image_folder(tmp_path / "in", 12)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1100, 1200, 3), dtype=np.uint8)).save(
        folder / "ant" / "big.png"
    )
    flags = ("--write_mode", "raw", "--max_resolution", "0")  # more than a small page
    out = prepare(folder, tmp_path / "a.beton", *flags)
    command = [sys.executable, "-W", "ignore", "-c", FFCV, str(out), str(os_cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    labels = open_beton(out).labels.tolist()
    assert json.loads(done.stdout) == [13, 1 << 22, labels, labels]


def test_ffcvs_own_writer_would_store_the_same_pixels(tmp_path):
    """Without kept JPEGs: to the pixel what FFCV's image field makes of them; only our JPEGs have restart markers."""
    field = pytest.importorskip("ffcv.fields.rgb_image", reason="FFCV is not installed")
    pixels = np.asarray(picture(5, (120, 160)))
    for mode in ("jpg", "raw"):
        stored = encode.encode(pixels, WriteOptions(max_resolution=100, write_mode=mode), 0.0)
        theirs, kept = np.zeros(1, field.RGBImageField().metadata_type)[0], []

        def malloc(size: int, kept: list = kept) -> tuple[int, np.ndarray]:
            kept.append(np.zeros(size, np.uint8))
            return 0, kept[-1]

        field.RGBImageField(write_mode=mode, max_resolution=100, jpeg_quality=90).encode(theirs, pixels, malloc)
        assert (stored.height, stored.width) == (int(theirs["height"]), int(theirs["width"]))
        if mode == "raw":
            assert stored.blob == kept[-1].tobytes()
            continue
        images = [Image.open(io.BytesIO(blob)) for blob in (stored.blob, kept[-1].tobytes())]
        assert np.array_equal(*map(np.asarray, images))
        assert [b"\xff\xdd" in blob for blob in (stored.blob, kept[-1].tobytes())] == [True, False]


@pytest.mark.parametrize(("width", "expected"), [(500, 2), (375, 2), (16, 1), (17, 2), (48, 3), (112, 1)])
def test_restart_markers_divide_the_rows(width, expected):
    assert encode.restart_interval(width) == expected
