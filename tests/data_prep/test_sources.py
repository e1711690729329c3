"""Sources: folders, lists, tar and Parquet files; which samples are taken, under which labels and names."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep import sources, verify
from data_prep.sets import read_csv
from data_prep.sources import open_source
from fasthpm.data import read_info
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.data.pixels import list_images
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, jpeg_bytes, picture, prepare
from tests.helpers.prepared_sets import KEEP, RAW_FLAGS, blobs, named, stored


def test_class_folders_sort_into_labels_and_the_order_is_seeded(tmp_path: Path) -> None:
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


def test_flat_folders_have_one_class(folder: Path) -> None:
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
def test_lists_with_labels_names_and_spaces(
    folder: Path, lines: str, labels: list[int], classes: tuple[str, ...]
) -> None:
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
def test_bad_lists_are_refused(folder: Path, lines: str, message: str) -> None:
    (folder / "list.txt").write_text(lines)
    with pytest.raises(UserError, match=message):
        list_images(folder / "list.txt")


def test_ambiguous_and_empty_sources_are_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", 2)
    picture(0).save(folder / "loose.png")
    with pytest.raises(UserError, match="both folders and images"):
        prepare(folder, tmp_path / "a.beton")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image files"):
        prepare(tmp_path / "empty", tmp_path / "a.beton")
    with pytest.raises(UserError, match="is not there"):
        prepare(tmp_path / "nowhere", tmp_path / "a.beton")


# ------------------------------------------------------------------------------------------------------- selection
def test_a_class_list_selects_and_orders(tmp_path: Path) -> None:
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
def test_bad_class_lists_are_refused(tmp_path: Path, lines: str, words: str) -> None:
    (tmp_path / "classes.txt").write_text(lines)
    with pytest.raises(UserError, match=words):
        prepare(image_folder(tmp_path / "in", 4), tmp_path / "a.beton", "--classes", str(tmp_path / "classes.txt"))


# ------------------------------------------------------------------------------------------------------- names
def test_names_of_any_kind(tmp_path: Path) -> None:
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


def test_a_terminal_without_unicode_can_show_everything(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff in")
    image_folder(folder, 2)
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-m", "data_prep.images", str(folder), str(tmp_path / "a.beton")]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"2 images" in done.stdout


def test_links_that_loop_or_lead_nowhere(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", 4)
    (folder / "ant" / "loop").symlink_to(folder / "ant")
    (folder / "bee" / "up").symlink_to(folder / "bee" / "down")
    (folder / "bee" / "down").symlink_to(folder / "bee" / "up")
    (folder / "cat").symlink_to(folder / "ant")  # a link to another class folder is the user's business
    out = prepare(folder, tmp_path / "a.beton", "--max_rejected", "2")
    assert open_beton(out).sidecar["counts"] == [2, 2, 2]
    rejected = {Path(path).name for path, _ in list(read_csv(tmp_path / "a.rejected.csv"))[1:]}
    assert rejected == {"up", "down"}


def test_no_images_at_all(tmp_path: Path) -> None:
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
def test_tar_shards_of_webdataset(tmp_path: Path, how: str) -> None:
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


def test_tar_shards_with_class_names_and_odd_samples(tmp_path: Path) -> None:
    write_tars(tmp_path / "in", 6, labels="name")
    writer = pytest.importorskip("webdataset.writer", reason="webdataset is not installed")
    with writer.TarWriter(str(tmp_path / "in" / "train-0002.tar")) as tar:
        tar.write({"__key__": "nolabel", "jpg": jpeg_bytes(picture(0))})
        tar.write({"__key__": "noimage", "cls": b"ant"})
        tar.write({"__key__": "broken", "jpg": b"x", "cls": b"ant"})
    out = prepare(tmp_path / "in", tmp_path / "a.beton", "--max_rejected", "3")
    beton = open_beton(out)
    assert (beton.info.classes, beton.info.unlabelled) == (("ant", "bee", "cat"), 1)
    assert [Path(name).stem for name, label in zip(named(out), beton.labels, strict=True) if label < 0] == ["nolabel"]
    reasons = {Path(path).stem: why for path, why in list(read_csv(tmp_path / "a.rejected.csv"))[1:]}
    assert "nolabel" not in reasons
    assert "none of its members is an image" in reasons["noimage"]
    assert "is no image that Pillow knows" in reasons["broken"]
    (tmp_path / "classes.txt").write_text("cat\nant\n")
    flags = ("--max_rejected", "3", "--classes", str(tmp_path / "classes.txt"))
    assert open_beton(prepare(tmp_path / "in", tmp_path / "b.beton", *flags)).sidecar["counts"] == [2, 2]


def test_damaged_and_missing_tar_shards_are_one_line(tmp_path: Path) -> None:
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


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_parquet_files_of_hugging_face(tmp_path: Path, described: bool, classes: tuple[str, ...]) -> None:
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


def test_parquet_splits_and_columns_must_be_chosen(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("texts", [["3", "0"], ["b", "a"], ["1", "", "0"]])
def test_labels_are_numbered(texts: list[str]) -> None:
    labels, classes = sources.number_labels(texts)
    assert [classes[label] if label >= 0 else "" for label in labels] == texts


# ------------------------------------------------------------------------------------------------------- what is meant
@pytest.mark.parametrize("ending", [".tar", ".parquet"])
@pytest.mark.parametrize("where", ["cat/x.jpg", "cat/more/x.JPEG", "x.png"])
def test_shards_beside_images_are_asked_about(tmp_path: Path, ending: str, where: str) -> None:
    (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / where).write_bytes(jpeg_bytes(picture(0)))
    (tmp_path / f"left{ending}").touch()
    words = rf"holds both \{ending} files \(left\{ending}, 1 in all\) and images \({re.escape(where)}, …\); say which"
    with pytest.raises(UserError, match=words):
        open_source(str(tmp_path))
    if "/" in where:
        assert open_source(os.path.join(tmp_path, "*", "")).names == [where]


def test_a_name_that_exists_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "[2020] {a,b} photos*"
    image_folder(folder, 4)
    (folder / "list[1].txt").write_text("ant/000.png\t0\nbee/001.png\t1\n")
    write_tars(folder / "[tars]", 4)
    assert len(open_source(str(folder / "list[1].txt"))) == 2
    assert len(open_source(str(folder / "[tars]" / "train-0000.tar"), num_workers=1)) == 2
    for pattern in ("train-*.tar", "train-000[01].tar", "train-{0000..0001}.tar"):
        assert len(open_source(str(folder / "[tars]" / pattern), num_workers=1)) == 4
    with pytest.raises(UserError, match=r"\[tars\]/train-0009\.tar is not there"):
        open_source(str(folder / "[tars]" / "train-{0000,0009}.tar"), num_workers=1)


# ------------------------------------------------------------------------------------------------------- no labels
@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 1, None, 2], [0, 1, -1, 2]),
        ([0, -1, 1, 2], [0, -1, 1, 2]),
        ([-1, -1], [-1, -1]),
        ([0.0, float("nan"), 2.0], [0, -1, 2]),
        ([], None),
        ([0, 1, 2, -2], None),
    ],
)
def test_parquet_rows_without_labels(
    tmp_path: Path, described: bool, values: list[float | None], labels: list[int] | None
) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    features = {"image": {"_type": "Image"}, "label": {"names": ["cow", "ape", "bat"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if described else None
    kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": jpeg_bytes(picture(0)), "path": "x.jpg"}] * len(values)
    kind = pa.float64() if any(isinstance(value, float) for value in values) else pa.int64()
    table = pa.table({"image": pa.array(rows, kinds), "label": pa.array(values, kind)})
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "x.parquet")
    if labels is None:
        with pytest.raises(UserError, match=r"hold no rows|has label -2|has the label '-2'"):
            open_source(str(tmp_path))
        return
    source = open_source(str(tmp_path))
    assert source.labels.tolist() == labels
    assert source.words == [f"{labels.count(-1)} of them unlabelled (label -1)"]


def test_unlabelled_images_are_kept_counted_and_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "in", 8)
    lines = [f"{path.relative_to(tmp_path)}\t{k % 3 - 1}" for k, path in enumerate(sorted(folder.rglob("*.png")))]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    out = prepare(tmp_path / "list.txt", tmp_path / "a.beton", "--shards", "2", "--val_count", "2")
    assert "a_val.beton: 2 images" in capsys.readouterr().out
    verify.main([str(out)])
    index = json.loads((tmp_path / "a.json").read_text())
    assert (index["num_unlabelled"], sum(index["counts"]), index["num_samples"]) == (3, 3, 6)
    info, direct = read_info(out), read_info(tmp_path / "list.txt")
    assert (info.classes, info.unlabelled) == (direct.classes, direct.unlabelled) == (("0", "1"), 3)
    assert open_beton(tmp_path / "a_val.beton").info.unlabelled == 0
    assert read_info(f"{out},{out}").unlabelled == 6
    sidecar = json.loads((tmp_path / "a-00000-of-00002.json").read_text())
    (tmp_path / "a-00000-of-00002.json").write_text(json.dumps(sidecar | {"num_unlabelled": 9}))
    with pytest.raises(UserError, match="num_unlabelled"):
        verify.main([str(out)])
    (tmp_path / "classes.txt").write_text("1\n0\n")
    flags = ("--classes", str(tmp_path / "classes.txt"))
    assert open_beton(prepare(tmp_path / "list.txt", tmp_path / "b.beton", *flags)).sidecar["counts"] == [2, 3]
    assert "unlabelled and so of none of the classes asked for: 3" in capsys.readouterr().out
