"""Fashion-MNIST from its own files."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import fashion_mnist, moving_fashion, torchvision_sets
from fasthpm.data import read_info
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.errors import UserError
from tests.helpers.prepared_sets import idx_files, stored


def test_fashion_mnist_values_are_those_of_the_idx_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = idx_files(tmp_path / "source")
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


def test_fashion_mnist_of_debian_is_read_whole() -> None:
    if not fashion_mnist.DEBIAN.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    pixels = fashion_mnist.read_idx(fashion_mnist.DEBIAN, "t10k-images-idx3-ubyte", fashion_mnist.IMAGES_MAGIC)
    labels = fashion_mnist.read_idx(fashion_mnist.DEBIAN, "t10k-labels-idx1-ubyte", fashion_mnist.LABELS_MAGIC)
    assert pixels.shape == (10000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10
    assert abs(pixels.mean() / 255 - 0.2868) < 1e-3


def test_bad_fashion_mnist_sources_are_refused(tmp_path: Path) -> None:
    flags = [str(tmp_path / "out"), "--source", str(tmp_path / "source")]
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.main(flags)
    idx_files(tmp_path / "source")
    path = tmp_path / "source" / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(UserError, match="cannot be read"):
        fashion_mnist.main(flags)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-50]))
    with pytest.raises(UserError, match="truncated"):
        fashion_mnist.main(flags)


def test_a_source_that_is_not_there_is_refused_even_if_all_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both sets that are made of it; nothing is left where nothing was, either."""
    for module in (fashion_mnist, moving_fashion):
        with pytest.raises(UserError, match=r"nowhere has no train-images-idx3-ubyte\.gz"):
            module.main([str(tmp_path / "out"), "--source", str(tmp_path / "nowhere")])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(fashion_mnist, "is_prepared", lambda _: True)
    with pytest.raises(UserError, match=r"nowhere has no train-images-idx3-ubyte\.gz"):
        fashion_mnist.main([str(tmp_path / "out"), "--source", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("make", [fashion_mnist.main, moving_fashion.main, torchvision_sets.main])
@pytest.mark.parametrize(("name", "problem"), [("file", "is a file, and a folder"), ("file/out", "would lie in")])
def test_folders_that_cannot_be_made_are_refused_first(
    tmp_path: Path, make: Callable[[list[str]], None], name: str, problem: str
) -> None:
    (tmp_path / "file").touch()
    words = ["cifar10", "nowhere"] if make is torchvision_sets.main else []
    with pytest.raises(UserError, match=problem):
        make([*words, str(tmp_path / name)])
