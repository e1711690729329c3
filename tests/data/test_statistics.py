"""Channels that a model takes and a set has not, and the mean and standard deviation that follow."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasthpm.data import DatasetInfo, build_loader, read_info, statistics
from fasthpm.data.pixels import luminance
from fasthpm.data.statistics import PixelStatistics
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, prepare


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images, grey and coloured, in every form of a set of images."""
    root = tmp_path_factory.mktemp("channels")
    found = {}
    for name in ("grey", "colour"):
        folder = image_folder(root / name, 6, sizes=((40, 48), (61, 37)), grey=name == "grey")
        found[f"{name} plain"] = folder
        for mode in ("raw", "jpg"):
            found[f"{name} {mode}"] = prepare(folder, root / f"{name}-{mode}.beton", "--write_mode", mode)
    return found


def read(source: Path, channels: int, train: bool) -> tuple[torch.Tensor, DatasetInfo]:
    loader = build_loader(source, batch_size=6, image_size=(24, 24), channels=channels, train=train, seed=2)
    (batch,) = loader
    loader.close()
    return batch.images, loader.info


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["plain", "raw", "jpg"])
def test_a_set_is_read_in_the_channels_of_the_model(sources: dict[str, Path], kind: str, train: bool) -> None:
    grey, own = read(sources[f"grey {kind}"], 1, train)
    three, info = read(sources[f"grey {kind}"], 3, train)
    assert torch.equal(three, grey.expand(-1, -1, -1, 3))
    assert (info.channels, info.mean, info.std) == (3, own.mean * 3, own.std * 3)
    colours, own = read(sources[f"colour {kind}"], 3, train)
    one, info = read(sources[f"colour {kind}"], 1, train)
    assert (one.int() - torch.from_numpy(luminance(colours.numpy())).int()).abs().max() <= 2
    assert (info.channels, len(info.mean), len(info.std)) == (1, 1, 1)
    assert info.mean[0] == pytest.approx(sum(w * m for w, m in zip((0.299, 0.587, 0.114), own.mean, strict=True)))
    assert read_info(sources[f"colour {kind}"], 1) == info


def test_conversion_is_said_once(sources: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        read(sources["colour raw"], 1, False)
        read(sources["grey raw"], 1, False)
    said = [line for line in capsys.readouterr().err.splitlines() if "channel" in line]
    assert len([line for line in said if "colour-raw.beton is coloured and the model takes 1 channel" in line]) <= 1
    assert not [line for line in said if "grey-raw.beton" in line]


def test_odd_channels_are_refused() -> None:
    with pytest.raises(UserError, match="x has 2 channels of uint8, and the model takes 3: use --channels 2"):
        statistics.as_read(DatasetInfo(1, 2, (0.5, 0.5), (0.1, 0.1), ()), 3, "x")


@pytest.mark.parametrize(("mean", "channels", "want"), [((0.2,), 3, (0.2,) * 3), ((0.3, 0.3, 0.3), 1, (0.3,))])
def test_equal_channels_are_grey(mean: tuple[float, ...], channels: int, want: tuple[float, ...]) -> None:
    got = PixelStatistics(mean, mean).in_channels(channels)
    assert got.mean == got.std == pytest.approx(want)
    assert min(PixelStatistics((0.0,), (0.0,)).in_channels(channels).std) > 0  # a set of one colour


def test_luminance_is_pils() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    assert np.array_equal(luminance(pixels)[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))


@pytest.mark.parametrize(
    "values",
    [None, {}, {"mean": [0.5]}, {"mean": [0.5], "std": [0.5, 0.5]}, {"mean": 0.5, "std": 0.5},
     {"mean": ["x"], "std": ["y"]}, {"mean": [], "std": []}, {"mean": [float("nan")], "std": [1.0]}],
)  # fmt: skip
def test_nonsense_is_no_statistics(values: object) -> None:
    assert statistics.statistics_from(values) is None
    good = PixelStatistics((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert statistics.statistics_from(good.as_json()) == good
