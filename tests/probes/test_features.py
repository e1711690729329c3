"""Features as a GPU makes them, on the CPU: in bfloat16, of batches that are asked for one ahead."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fasthpm.checkpoint.weights import load_weights
from fasthpm.data import build_loader
from fasthpm.data.device import DeviceLoader
from fasthpm.probes import features, finetune, knn, linear
from fasthpm.probes.finetune import building, command
from tests.helpers.finetuning import DATA, FLOAT32, same_weights, start

LINEAR = ("--epochs", "2", "--global_batch_size", "16", "--batch_size", "8", "--lr", "0.3")
TUNE = ("--epochs", "1", "--batch_size", "8", "--global_batch_size", "16", "--num_workers", "1", "--lr", "1e-3")


def in_bfloat16(device: torch.device) -> torch.autocast:
    """A fake of `features.half`: a CPU that is taken for a GPU."""
    return torch.autocast(device.type, torch.bfloat16)


def rows_of(run: Path, path: str) -> features.Features:
    model, recipe = load_weights(run, "student")
    loader = build_loader(path, batch_size=64, image_size=(28, 28), channels=1, train=False)
    try:
        return features.features(model, recipe, loader, "mean", torch.device("cpu"), quiet=True)
    finally:
        loader.close()


def test_on_a_cpu_features_stay_in_float32() -> None:
    assert not features.half(torch.device("cpu"))._enabled


def test_neighbours_are_the_same_in_bfloat16(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = [rows_of(run, path) for path in ("synthetic:100", "synthetic:50")]
    monkeypatch.setattr(features, "half", in_bfloat16)
    rounded = [rows_of(run, path) for path in ("synthetic:100", "synthetic:50")]
    found = []
    for bank, queries in (exact, rounded):
        assert bank.rows.dtype == torch.float32
        found.append(knn.knn_accuracy(bank.rows, bank.labels, queries.rows, queries.labels, 10))
    assert not torch.equal(exact[0].rows, rounded[0].rows)
    assert (exact[0].rows * rounded[0].rows).sum(1).min() > 0.9999
    assert max(abs(found[0][k] - found[1][k]) for k in found[0]) <= 2.0  # 1 of 50


def test_linear_features_are_those_of_knn_in_bfloat16(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "half", in_bfloat16)
    model, recipe = load_weights(run, "student")
    loader = build_loader("synthetic:20", batch_size=8, image_size=(28, 28), channels=1, train=False)
    encoder = features.PooledEncoder(model, recipe, loader, "mean", torch.device("cpu"))
    rows, _ = encoder.whole(loader, 1, quiet=True)
    loader.close()
    torch.testing.assert_close(torch.nn.functional.normalize(rows, dim=1), rows_of(run, "synthetic:20").rows)


@pytest.fixture(scope="module")
def plain(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a linear probe and a fine-tuning, and their figures."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, probed(run, folder)


def probed(run: Path, folder: Path) -> tuple[Any, ...]:
    """k-NN's accuracies, and what the test of a fine-tuning says."""
    near = knn.main([str(run), *DATA, "--k", "5", "--bank_size", "20", "-o", str(folder / "knn.json")])
    start(linear, run, *DATA, *LINEAR, "--output_dir", folder / "linear")
    start(finetune, run, *DATA, *TUNE, *FLOAT32, "--output_dir", folder / "ft")
    return near.accuracies, figures_of(run, folder)


def figures_of(run: Path, folder: Path) -> dict[str, float]:
    words = [str(run), *DATA, "--evaluate", "--output_dir", str(folder / "ft")]
    return {name: value for name, value in command.main(words).figures.items() if name != "gpu_hours"}


def test_batches_one_ahead_give_the_same(
    run: Path, plain: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[DeviceLoader] = []

    def ahead(loader: Any, device: torch.device) -> DeviceLoader:
        """A fake of `on_device` that takes the CPU for a GPU."""
        made.append(DeviceLoader(loader, device))
        return made[-1]

    for module in (knn, linear, building, command):
        monkeypatch.setattr(module, "on_device", ahead)
    folder, figures = plain
    assert probed(run, tmp_path) == figures
    assert len(made) == 2 + 2 + 2 + 1  # both sets of each, and the test's
    assert same_weights(folder / "linear" / linear.HEAD, tmp_path / "linear" / linear.HEAD)
    assert same_weights(*(path / "ft" / "classifier.safetensors" for path in (folder, tmp_path)))


def test_a_classifier_is_tested_in_bfloat16(
    run: Path, plain: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (_, exact) = plain
    monkeypatch.setattr(command, "half", in_bfloat16)
    rounded = figures_of(run, folder)
    assert exact["val_loss"] != rounded["val_loss"]
    assert rounded["val_loss"] == pytest.approx(exact["val_loss"], rel=0.01)
