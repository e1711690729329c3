"""Transfer sets: tiny fakes of CIFAR, STL-10 and Tiny ImageNet as they lie on disk, read back from what was written."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import torchvision_sets
from fasthpm.data import build_loader, read_info
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import jpeg_bytes, picture

RNG = np.random.default_rng(0)


def images_of(path: Path, side: int) -> dict[int, list[bytes]]:
    """The stored images of a prepared set by label."""
    count = read_info(path).num_samples
    loader = build_loader(path, batch_size=count, image_size=(side, side), channels=3, train=False, num_workers=1)
    batch = next(iter(loader))
    loader.close()
    found: dict[int, list[bytes]] = {}
    for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
        found.setdefault(label, []).append(image.tobytes())
    return {label: sorted(images) for label, images in found.items()}


def expected_of(planes: np.ndarray, labels: np.ndarray) -> dict[int, list[bytes]]:
    """The same of uint8 [N, 3, H, W] and labels."""
    found: dict[int, list[bytes]] = {}
    for image, label in zip(planes, labels, strict=True):
        found.setdefault(int(label), []).append(np.ascontiguousarray(image.transpose(1, 2, 0)).tobytes())
    return {label: sorted(images) for label, images in found.items()}


def draw(count: int, side: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (count, 3, side, side), dtype=np.uint8), RNG.integers(0, classes, count)


def dump(path: Path, values: dict[Any, Any]) -> None:
    path.write_bytes(pickle.dumps(values, protocol=2))


def test_cifar10_as_torchvision_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"class{k}" for k in range(10)]
    dump(folder / "batches.meta", {b"label_names": [name.encode() for name in names]})
    pixels, labels = draw(15, 32, 10)
    for number in range(5):
        part = slice(3 * number, 3 * number + 3)
        rows = pixels[part].reshape(3, -1)
        dump(folder / f"data_batch_{number + 1}", {b"data": rows, b"labels": labels[part].tolist()})
    dump(folder / "test_batch", {b"data": pixels[:4].reshape(4, -1), b"labels": labels[:4].tolist()})
    torchvision_sets.main(["cifar10", str(tmp_path), str(tmp_path / "out"), "--num_workers", "1"])
    assert images_of(tmp_path / "out" / "train.beton", 32) == expected_of(pixels, labels)
    assert images_of(tmp_path / "out" / "val.beton", 32) == expected_of(pixels[:4], labels[:4])
    assert read_info(tmp_path / "out" / "val.beton").classes == tuple(names)
    before = (tmp_path / "out" / "train.beton").stat().st_mtime_ns
    torchvision_sets.main(["cifar10", str(folder), str(tmp_path / "out"), "--num_workers", "1"])
    assert (tmp_path / "out" / "train.beton").stat().st_mtime_ns == before


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/evil",)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    dump(tmp_path / "meta", {b"fine_label_names": Evil()})
    with pytest.raises(UserError, match=r"it wants to run posix\.system"):
        torchvision_sets.read_pickle(tmp_path / "meta")
    (tmp_path / "broken").write_bytes(b"\x80\x02}q")
    with pytest.raises(UserError, match="is not a CIFAR batch"):
        torchvision_sets.read_pickle(tmp_path / "broken")


def test_cifar100_in_the_binary_form(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("".join(f"fine{k}\n" for k in range(100)))
    pixels, labels = draw(6, 32, 100)
    coarse = np.zeros((6, 1), np.uint8)
    rows = np.concatenate([coarse, labels[:, None].astype(np.uint8), pixels.reshape(6, -1)], 1)
    rows.tofile(folder / "train.bin")
    rows[:2].tofile(folder / "test.bin")
    found = torchvision_sets.read_cifar(tmp_path, 100)
    assert found["train"][1].tolist() == labels.tolist()
    assert np.array_equal(found["val"][0], pixels[:2].transpose(0, 2, 3, 1))
    (folder / "test.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="has 3 bytes, expected a multiple of 3074"):
        torchvision_sets.read_cifar(tmp_path, 100)
    with pytest.raises(UserError, match="no folder cifar-10-batches-py or cifar-10-batches-bin"):
        torchvision_sets.read_cifar(tmp_path, 10)


def test_stl10_is_stored_by_columns_and_counts_from_one(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(f"c{k}" for k in range(10)) + "\n")
    pixels, labels = draw(3, 96, 10)
    for name in ("train", "test", "unlabeled"):
        pixels.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")
        (labels + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    found = torchvision_sets.read_stl10(folder)
    assert np.array_equal(found["train"][0], pixels.transpose(0, 2, 3, 1))
    assert found["val"][1].tolist() == labels.tolist()
    assert found["unlabeled"][2] == ("unlabeled",)


def test_tiny_imagenet_lists_both_splits(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for index, wnid in enumerate(("n02", "n01")):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / "images" / f"{wnid}_0.JPEG").write_bytes(jpeg_bytes(picture(index, (64, 64))))
        (root / "val" / "images" / f"val_{index}.JPEG").write_bytes(jpeg_bytes(picture(5 + index, (64, 64))))
        lines.append(f"val_{index}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    torchvision_sets.main(["tiny_imagenet", str(tmp_path), str(tmp_path / "out"), "--num_workers", "1"])
    for split in ("train", "val"):
        info = read_info(tmp_path / "out" / f"{split}.beton")
        assert (info.num_samples, info.classes) == (2, ("n01", "n02"))
    (root / "val" / "val_annotations.txt").write_text(lines[0])
    with pytest.raises(UserError, match="has 2 classes in train and 1 or others in val"):
        torchvision_sets.list_tiny_imagenet(tmp_path, tmp_path / "out")
