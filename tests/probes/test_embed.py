"""Features on disk: the same as the probes', of runs, exported files and timm; streamed, whole or not there at all."""

import dataclasses
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import fasthpm
from fasthpm import recipes
from fasthpm.data import build_loader
from fasthpm.errors import UserError
from fasthpm.probes import embed
from fasthpm.probes.knn import knn_accuracy
from tests.helpers.data_fixtures import image_folder, prepare_shards
from tests.helpers.runs import run_with_random_weights

TRAIN, VAL = "synthetic:90", "synthetic:30"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("embed") / "run"
    return run_with_random_weights(output, dataclasses.replace(recipes.debug(), data_path=TRAIN))


@pytest.fixture(scope="module")
def encoder(run: Path) -> Path:
    """timm's encoder of the run."""
    fasthpm.export(run, output=run / "encoder.safetensors")
    return run / "encoder.safetensors"


def embedded(run: Path, out: Path, **flags: Any) -> dict[str, Any]:
    """The arrays of a .npz, and its info."""
    fasthpm.embed(run, output=out, **{"data_path": VAL, "batch_size": 16, **flags})
    with np.load(out) as file:
        arrays = {name: file[name] for name in file.files}
    return {**arrays, "info": json.loads(str(arrays["info"]))}


@pytest.mark.parametrize("features", ["cls", "mean"])
def test_k_nn_on_saved_features_is_the_probes(run: Path, tmp_path: Path, features: str) -> None:
    bank, queries = (
        embedded(run, tmp_path / f"{name}.npz", data_path=name, features=features, batch_size=32)
        for name in (TRAIN, VAL)
    )
    rows = [F.normalize(torch.from_numpy(side["features"]), dim=1) for side in (bank, queries)]
    labels = [torch.from_numpy(side["labels"]) for side in (bank, queries)]
    ours = knn_accuracy(rows[0], labels[0], rows[1], labels[1], len(bank["classes"]))
    probe = fasthpm.knn(run, train_path=TRAIN, val_path=VAL, pool=features, batch_size=32, output=tmp_path / "k.json")
    assert ours == probe.accuracies["student", 0]
    assert probe.accuracy == ours[probe.k] == max(ours.values())


def test_a_run_says_what_made_its_features(run: Path, tmp_path: Path) -> None:
    found = embedded(run, tmp_path / "new" / "a.npz")
    assert found["features"].shape == (30, 128)
    assert found["features"].dtype == np.float32
    assert found["ids"].tolist() == list(range(30))
    assert found["labels"].tolist() == [index % 10 for index in range(30)]
    assert found["classes"].tolist() == [f"waves{label}" for label in range(10)]
    assert "names" not in found
    info = found["info"]
    assert (info["features"], info["weights"], info["normalize"]) == ("cls", "student", "model")
    assert (info["model"], info["image_size"]) == ("hpm_vit_nano_patch4_28", [28, 28])
    assert len(info["checkpoint_hash"]) == 64
    assert info["mean"] == pytest.approx(list(build_info(TRAIN).mean))
    other = embedded(run, tmp_path / "b.npz", normalize="data")["info"]
    assert other["mean"] == list(build_info(VAL).mean)
    untrained = embedded(run, tmp_path / "c.npz", weights="untrained")
    assert np.abs(untrained["features"] - found["features"]).max() > 0.1


def build_info(path: str) -> Any:
    loader = build_loader(path, batch_size=1, image_size=(28, 28), channels=1, train=False)
    loader.close()
    return loader.info


def test_the_exported_encoder_gives_the_runs_features(run: Path, encoder: Path, tmp_path: Path) -> None:
    for features in embed.FEATURES:
        ours, theirs = (embedded(source, tmp_path / "a.npz", features=features) for source in (run, encoder))
        np.testing.assert_allclose(theirs["features"], ours["features"], atol=1e-4)
        assert len(theirs["info"]["sha256"]) == 64
    whole = tmp_path / "whole.safetensors"
    fasthpm.export(run, output=whole, format="safetensors")
    np.testing.assert_array_equal(embedded(whole, tmp_path / "a.npz", features="patches")["features"], ours["features"])


def test_patches_go_to_a_file_that_is_not_read_whole(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "patches.npy"
    result = fasthpm.embed(run, data_path=VAL, features="patches", dtype="float16", output=out, batch_size=16)
    mapped = np.load(out, mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert (mapped.shape, mapped.dtype) == (result.shape, np.float16) == ((30, 49, 128), np.float16)
    whole = embedded(run, tmp_path / "a.npz", features="patches")
    np.testing.assert_allclose(mapped, whole["features"], atol=5e-3)
    assert whole["info"]["grid"] == [1, 7, 7]
    mean = embedded(run, tmp_path / "b.npz", features="mean")["features"]
    np.testing.assert_allclose(whole["features"].mean(axis=1), mean, atol=1e-5)
    with np.load(result.info) as beside:
        assert beside["labels"].tolist() == whole["labels"].tolist()
        assert "features" not in beside.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "patches.info.npz", "patches.npy"]


def test_only_one_batch_is_in_memory(tmp_path: Path) -> None:
    """The writer asks for the next batch only when the one before is in the file."""
    columns, written = embed.Columns("float32"), []

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in (0, 4):
            written.append(file.tell())
            yield torch.zeros(4, 2, 8), torch.zeros(4).long(), torch.arange(start, start + 4)

    with (tmp_path / "a.npy").open("wb") as file:
        columns.write(file, (8, 2, 8), batches())
    assert written[1] - written[0] == 4 * 2 * 8 * 4
    assert np.load(tmp_path / "a.npy").shape == (8, 2, 8)
    with (tmp_path / "b.npy").open("wb") as file, pytest.raises(RuntimeError, match="out of order"):
        embed.Columns("float32").write(file, (9, 2, 8), batches())


def test_names_are_the_files(run: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "photos", 6, grey=True)
    found = embedded(run, tmp_path / "a.npz", data_path=folder)
    assert [Path(name).stem for name in found["names"]] == ["000", "002", "004", "001", "003", "005"]
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["classes"].tolist() == ["ant", "bee"]
    shards = prepare_shards(folder, tmp_path / "set.beton", 2, "--grey")
    prepared = embedded(run, tmp_path / "b.npz", data_path=shards)
    assert len(prepared["names"]) == 6
    place = {Path(name).stem: row for row, name in enumerate(prepared["names"])}
    for row, name in enumerate(found["names"]):
        assert prepared["labels"][place[Path(name).stem]] == found["labels"][row]


def test_a_video_run(tmp_path: Path) -> None:
    changes = {"model": "hpm_vit_nano_patch8_32_video", "input_size": "32", "patch_size": 8, "num_frames": 4}
    recipe = dataclasses.replace(recipes.debug(), **changes, tubelet_size=2, channels=3, mask_policy="hpm")
    run = run_with_random_weights(tmp_path / "run", recipe)
    found = embedded(run, tmp_path / "a.npz", data_path="synthetic:8", features="patches")
    assert found["features"].shape[1] == 2 * 4 * 4
    assert found["info"]["num_frames"] == 4
    pooled = embedded(run, tmp_path / "a.npz", data_path="synthetic:8")
    np.testing.assert_allclose(pooled["features"], found["features"].mean(axis=1), atol=1e-5)
    with pytest.raises(UserError, match="has no cls token; use --features mean"):
        fasthpm.embed(run, data_path="synthetic:8", features="cls", output=tmp_path / "b.npz")


def test_a_timm_model_is_normalised_its_own_way(tmp_path: Path) -> None:
    vit = timm.create_model("test_vit", num_classes=7).eval()
    assert isinstance(vit, timm.models.VisionTransformer)
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    found = embedded(tmp_path / "vit.pth", tmp_path / "a.npz", timm="test_vit", data_path="synthetic:4")
    side, mean, std = vit.patch_embed.img_size, vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"]
    loader = build_loader("synthetic:4", batch_size=4, image_size=tuple(side), channels=3, train=False)
    images = next(iter(loader)).images
    loader.close()
    pixels = ((images / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        want = vit.forward_features(pixels)[:, 0]
    np.testing.assert_allclose(found["features"], want.numpy(), atol=1e-4)
    assert found["info"]["mean"] == list(mean)


def test_a_fine_tuned_classifiers_mean_is_normed(tmp_path: Path) -> None:
    """A classifier with global_pool avg has its norm behind the mean."""
    settings = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    settings |= {"num_classes": 3, "global_pool": "avg"}
    vit = timm.models.VisionTransformer(**settings).eval()
    torch.nn.init.normal_(vit.fc_norm.weight)
    path = tmp_path / "classifier.safetensors"
    save_file(vit.state_dict(), path, metadata={"timm": json.dumps({**settings, "img_size": [28, 28]})})
    found = embedded(path, tmp_path / "a.npz", data_path="synthetic:4")
    info = found["info"]
    loader = build_loader("synthetic:4", batch_size=4, image_size=(28, 28), channels=1, train=False)
    images = next(iter(loader)).images
    loader.close()
    pixels = ((images / 255 - torch.tensor(info["mean"])) / torch.tensor(info["std"])).permute(0, 3, 1, 2)
    with torch.no_grad():
        want = vit.forward_head(vit.forward_features(pixels), pre_logits=True)
    np.testing.assert_allclose(found["features"], want.numpy(), atol=1e-4)
    with pytest.raises(UserError, match="model's own data are not known; use --normalize data"):
        fasthpm.embed(path, data_path="synthetic:4", normalize="model", output=tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"output": "a.txt"}, r"output is .*a\.txt, expected a name that ends in \.npz or \.npy"),
        ({"timm": "test_vit"}, "test_vit needs its weights, and .* is no file"),
        ({"features": "clz"}, "invalid choice: 'clz'"),
        ({"run": "encoder", "timm": "test_vitt"}, "is no model of timm .*; did you mean 'test_vit"),
        ({"run": "encoder", "timm": "resnet18"}, "is a ResNet, expected a VisionTransformer"),
        ({"run": "encoder", "timm": "vit_tiny_patch16_224"}, "is of another network: it lacks blocks"),
        ({"run": "encoder", "weights": "teacher"}, "--weights teacher is for runs"),
        ({"run": "plain"}, "does not say which network it belongs to; name it with --timm"),
        ({"weights": "teacher"}, "has no teacher weights"),
        ({"data_path": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    run: Path, encoder: Path, tmp_path: Path, flags: dict[str, str], message: str
) -> None:
    save_file({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, tmp_path / "plain.safetensors")
    sources = {"encoder": encoder, "plain": tmp_path / "plain.safetensors"}
    given = {"data_path": VAL, **flags, "run": sources.get(flags.get("run", ""), run)}
    given["output"] = tmp_path / "out" / flags.get("output", "a.npz")
    with pytest.raises(UserError, match=message) as caught:
        fasthpm.embed(**given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder.npz", "which is a folder; name a file"),
        ("a.info.npz/b.npy", "and that is a file"),
        ("images/a.npy", "would overwrite what is read"),
        ("images/a.npz", "would overwrite what is read"),
        ("images/b.npy", "would overwrite what is read"),  # what lies beside it
        ("folder.npy", "which is a folder; name a file"),
    ],
)
def test_a_place_that_cannot_be_is_told_before_the_work(
    output: str, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("images", "folder.npz", "folder.info.npz"):
        (tmp_path / folder).mkdir()
    for name in ("images/a.npy", "images/a.npz", "images/b.info.npz", "a.info.npz"):
        (tmp_path / name).touch()
    monkeypatch.setattr(embed, "encoder_of", None)
    with pytest.raises(UserError, match=message):
        fasthpm.embed(run, data_path=tmp_path / "images", output=tmp_path / output)


def test_a_launcher_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        fasthpm.embed(run, data_path=VAL, output=tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"{name} cannot be written \(File too large\)"):
            fasthpm.embed(run, data_path=VAL, output=tmp_path / name, batch_size=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"before"


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    rows = iter([(torch.full((1, 2), 1e6), torch.zeros(1).long(), torch.zeros(1).long())])
    with (tmp_path / "a.npy").open("wb") as file, pytest.raises(UserError, match="not finite in float16; use --dtype"):
        embed.Columns("float16").write(file, (1, 2), rows)
