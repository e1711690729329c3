"""Prepared sets: one file or many, and what is refused."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import verify
from fasthpm.data import build_loader, read_info
from fasthpm.data.ffcv.prepared import merged_ranges, open_set
from fasthpm.data.values import Values
from tests.helpers.data_fixtures import image_folder, list_sources, picture, prepare, prepare_shards
from tests.helpers.golden import GOLDEN
from tests.helpers.loaders import SIZE, joined, refused, same


# ------------------------------------------------------------------------------------------------------- many files
def test_shards_are_one_set_and_equal_to_their_union(sources: dict[str, str]) -> None:
    options = {"batch_size": 5, "image_size": SIZE, "channels": 3, "seed": 3}
    files = sorted(Path(sources["shards"]).parent.glob("many-*.beton"))
    assert len(files) == 3
    evaluated = joined(list(build_loader(sources["shards"], train=False, **options)))
    single = [joined(list(build_loader(file, train=False, **options))) for file in files]
    assert torch.equal(evaluated.images, torch.cat([batch.images for batch in single]))
    assert torch.equal(evaluated.labels, torch.cat([batch.labels for batch in single]))
    union = build_loader(",".join(map(str, files)), **options)
    assert all(same(a, b) for a, b in zip(build_loader(sources["shards"], **options), union, strict=True))


def test_mean_and_std_of_a_union_weigh_pixels(tmp_path: Path) -> None:
    infos = {}
    for name, count, first in (("a", 4, 0), ("b", 2, 4), ("all", 6, 0)):
        folder = tmp_path / name
        for index in range(first, first + count):
            target = folder / ("ant", "bee")[index % 2]
            target.mkdir(parents=True, exist_ok=True)
            picture(index, (40, 48) if index < 4 else (20, 24)).save(target / f"{index}.png")
        infos[name] = read_info(prepare(folder, tmp_path / f"{name}.beton", "--write_mode", "raw"))
        pixels = {"a": 4 * 40 * 48, "b": 2 * 20 * 24, "all": 1}[name]
        sidecar = tmp_path / f"{name}.json"
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"pixels": pixels}))
    union = f"{tmp_path}/a.beton,{tmp_path}/b.beton"
    merged = read_info(union)
    assert merged.num_samples == 6
    assert merged.classes == ("ant", "bee")
    assert np.allclose(merged.mean, infos["all"].mean, atol=1e-6)
    assert np.allclose(merged.std, infos["all"].std, atol=1e-6)
    sidecar = tmp_path / "a.json"
    values = json.loads(sidecar.read_text())
    del values["pixels"]
    sidecar.write_text(json.dumps(values))
    by_samples = (4 * np.array(infos["a"].mean) + 2 * np.array(infos["b"].mean)) / 6
    assert np.allclose(read_info(union).mean, by_samples)
    assert not np.allclose(by_samples, merged.mean, atol=1e-4)


def test_bad_shards_and_unions_are_refused(tmp_path: Path) -> None:
    out = prepare_shards(image_folder(tmp_path / "folder", 12), tmp_path / "set.beton", 2)
    first, second = sorted(tmp_path.glob("set-*.beton"))
    index, whole = out.with_suffix(".json"), second.read_bytes()
    good = json.loads(index.read_text())
    second.write_bytes(whole[:-1])
    refused(out, r"set-00001-of-00002\.beton has .* truncated")
    second.unlink()
    refused(out, r"set-00001-of-00002\.beton does not exist, but .*set\.json lists it")
    second.write_bytes(whole)
    for change, message in (
        ({"num_samples": 13}, "hold 12 samples, .*set.json says 13"),
        ({"classes": ["ant"]}, r"1 classes, .*set-00000-of-00002\.beton has 2"),
        ({"channels": 1, "mean": [0.5], "std": [0.5]}, "1 channels, .*has 3"),
        ({"shards": []}, "lists no shards"),
        ({"shards": [7]}, "lists no shards"),
        ({"shards": ["../set-00000-of-00002.beton"]}, r"lists '\.\./set-0.*', expected names of files beside it"),
        ({"shards": ["/etc/passwd"]}, "lists '/etc/passwd', expected names of files beside it"),
        ({"shards": None}, "no list named 'shards'"),
        ({"format": "something"}, r"set\.beton does not exist"),
    ):
        index.write_text(json.dumps(good | change))
        refused(out, message)
    index.write_text(json.dumps(good))
    grey = prepare(image_folder(tmp_path / "grey", 4, grey=True), tmp_path / "grey.beton")
    refused(f"{out},{grey}", r"set\.beton has 3 channels, .*grey\.beton has 1")
    refused(f"{out},", "joins '', which is no .beton")
    refused(f"{out},{tmp_path / 'folder'}", "only prepared sets can be joined")
    refused(f"{first},{tmp_path / 'no.beton'}", r"no\.beton does not exist")


def test_samples_are_named_by_the_file_they_were_made_of(tmp_path: Path) -> None:
    out = prepare_shards(image_folder(tmp_path / "folder", 8), tmp_path / "set.beton", 2)
    second = tmp_path / "set-00001-of-00002.beton"
    list_sources(second, ["a.png", "with, comma\nand line.png", "b.png", "caf\udce9.png"])
    (tmp_path / "set-00000-of-00002.files.csv").unlink()  # as older sets, and those of others
    names = [open_set(out).name_of(sample) for sample in range(8)]
    assert names[3] == f"{tmp_path / 'set-00000-of-00002.beton'}: sample 3"
    assert names[4] == f"a.png ({second}, sample 0)"
    assert names[5].startswith("with, comma and line.png (")
    assert names[7].startswith("caf\\udce9.png (")


def test_ranges_to_read_are_merged_where_they_nearly_touch() -> None:
    begin, end = np.array([900, 0, 10**6, 10**6 + 5]), np.array([1000, 100, 10**6 + 9, 10**6 + 6])
    assert merged_ranges(begin, end) == [(0, 1000), (10**6, 10**6 + 9)]
    assert merged_ranges(begin[:0], end[:0]) == []


# ------------------------------------------------------------------------------------------------------- refusals
def test_bad_sidecars_are_refused(beton: Path) -> None:
    sidecar = beton.with_suffix(".json")
    good = json.loads(sidecar.read_text())
    for change, message in (
        ({"num_samples": 7}, "holds 23 samples"),
        ({"bytes": 7}, "sidecar says 7"),
        ({"mean": [0.5]}, "contradicts itself"),
        ({"classes": None}, "no list named 'classes'"),
    ):
        sidecar.write_text(json.dumps(good | change))
        refused(beton, message)
    sidecar.write_text("[]")
    refused(beton, "not the sidecar")
    sidecar.write_text("{")
    refused(beton, "cannot be read")
    sidecar.unlink()
    refused(beton, "set.json cannot be read")


# ------------------------------------------------------------------------------------------------------- older files
@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_files_that_were_prepared_before_arrays_were_known_are_read(tmp_path: Path, mode: str) -> None:
    """Four images of `shade` each, written by the commit before (63f04fc)."""

    def shade(k: int) -> np.ndarray:
        y, x = np.mgrid[: 20 + k, : 30 - k]
        return np.stack([(7 * x + 3 * y + 50 * k) % 256, (5 * y + 11 * k) % 256, (x * y) % 256], 2).astype(np.uint8)

    with tarfile.open(GOLDEN / "before_arrays.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / f"old_{mode}.beton"
    data = open_set(path)
    assert not data.holds_arrays
    assert data.info.classes == ("ant", "bee")
    assert data.info.values == Values()
    for sample, (height, width) in enumerate(zip(data.heights.tolist(), data.widths.tolist(), strict=True)):
        loader = build_loader(path, batch_size=1, image_size=(height, width), channels=3, train=False, whole=True)
        found = loader.take(0, np.array([sample])).images[0].numpy()
        loader.close()
        number = int(Path(data.name_of(sample).split(" (")[0]).stem)
        assert data.labels[sample] == number % 2
        difference = np.abs(found.astype(int) - shade(number))
        assert difference.max() == 0 if mode == "raw" else difference.mean() < 25
    verify.main([str(path)])
