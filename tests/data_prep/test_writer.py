"""Sets as files: pages, shards, and what FFCV itself makes of them."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import encode, verify
from data_prep.encode import WriteOptions
from data_prep.sets import members, read_index
from data_prep.writer import write_beton
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, picture, prepare
from tests.helpers.prepared_sets import blobs, named, stored


def test_samples_larger_than_ffcvs_page_are_written(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3), dtype=np.uint8)
    out = tmp_path / "big.beton"
    write_beton([(image, 0)], out, ["noise"], options=WriteOptions(write_mode="raw"), num_workers=1)
    assert np.array_equal(stored(out)[0], image)


# ------------------------------------------------------------------------------------------------------- shards
def test_the_union_of_shards_is_the_single_set(tmp_path: Path) -> None:
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


def test_a_sharded_set_replaces_a_single_one_and_back(tmp_path: Path) -> None:
    folder, out = image_folder(tmp_path / "in", 6), tmp_path / "a.beton"
    prepare(folder, out)
    prepare(folder, out, "--shards", "2", "--overwrite")
    assert not out.exists()
    with pytest.raises(UserError, match="use --overwrite"):
        prepare(folder, out)
    prepare(folder, out, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a.beton", "a.files.csv", "a.json"]


def test_all_files_of_a_job_have_as_many_channels(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", 8, grey=True)
    picture(0).save(folder / "ant" / "colour.png")
    for seed in "012":  # the colours are in different files
        flags = ("--shards", "3", "--val_count", "2", "--seed", seed, "--overwrite")
        out = prepare(folder, tmp_path / "a.beton", *flags)
        sets = [*members(out), tmp_path / "a_val.beton"]
        assert {open_beton(path).info.channels for path in sets} == {3}


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
def test_ffcvs_own_loader_reads_what_we_write(tmp_path: Path, os_cache: bool) -> None:
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


def test_ffcvs_own_writer_would_store_the_same_pixels(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("grey", [True, False])
def test_channels_may_be_asked_for(tmp_path: Path, grey: bool) -> None:
    folder = image_folder(tmp_path / "in", 4, grey=grey)
    infos = {}
    for flags in ((), ("--channels", "1"), ("--channels", "3"), ("--grey",)):
        name = "".join(flags).strip("-") or "measured"
        infos[name] = open_beton(prepare(folder, tmp_path / f"{name}.beton", *flags)).info
    assert {name: info.channels for name, info in infos.items()} == {
        "measured": 1 if grey else 3,
        "channels1": 1,
        "channels3": 3,
        "grey": 1,
    }
    assert infos["grey"] == infos["channels1"]
    if grey:
        assert infos["channels3"].mean == infos["measured"].mean * 3
        assert infos["channels3"].std == infos["measured"].std * 3
