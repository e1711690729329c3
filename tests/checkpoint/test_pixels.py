"""By what a run's pixels are normalised: of new runs, of older ones, of those whose data is gone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fasthpm
from fasthpm import checkpoint, patches, recipes
from fasthpm.checkpoint.pixels import PIXELS, pixels_note
from fasthpm.data import build_loader, read_info
from fasthpm.data.augmented import Augmentation, AugmentedLoader
from fasthpm.data.statistics import PixelStatistics, statistics_of
from fasthpm.pictures import visualize
from fasthpm.probes import encoders
from fasthpm.probes.features import features
from fasthpm.probes.finetune import building
from fasthpm.probes.finetune.settings import FineTune
from fasthpm.recipe import Recipe
from tests.helpers.data_fixtures import image_folder, prepare
from tests.helpers.runs import run_with_random_weights

OWN = PixelStatistics((0.3,), (0.2,))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pixels")
    return prepare(image_folder(root / "images", 12, grey=True), root / "set.beton")


def run_in(folder: Path, **changes: Any) -> tuple[Path, Path, Recipe]:
    """A run, its checkpoint and its recipe, without a note of its pixels."""
    recipe = dataclasses.replace(recipes.debug(), **changes)
    run = run_with_random_weights(folder, recipe)
    return run, checkpoint.checkpoint_of(run), recipe


def note(folder: Path, statistics: PixelStatistics) -> None:
    (folder / PIXELS).write_text(pixels_note(statistics)[PIXELS])


def test_a_note_in_the_checkpoint_comes_first(tmp_path: Path, data: Path) -> None:
    run, folder, recipe = run_in(tmp_path / "run", data_path=str(data), global_batch_size=4, steps_per_epoch=3)
    info = read_info(data)
    assert checkpoint.pixels_of(folder, recipe) == statistics_of(info)  # an older run, its data still there
    exported = {"mean": json.dumps([0.4]), "std": json.dumps([0.1])}
    save_file({"x": torch.zeros(1)}, run / "encoder.safetensors", exported)
    assert checkpoint.pixels_of(folder, recipe) == PixelStatistics((0.4,), (0.1,))
    note(folder, OWN)
    assert checkpoint.pixels_of(folder, recipe) == OWN
    for weights in ("student", "untrained"):
        assert checkpoint.load_weights(run, weights)[0].pixels == OWN


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"global_batch_size": 4, "steps_per_epoch": 3}, True),
        ({"global_batch_size": 4, "steps_per_epoch": 2}, False),  # another number of samples than it was trained on
        ({"global_batch_size": 4, "steps_per_epoch": 4}, False),
        ({"global_batch_size": 4, "steps_per_epoch": 3, "channels": 3}, False),
        ({"data_path": "nowhere.beton"}, False),
        ({"data_path": ""}, False),
        ({"data_path": "synthetic:64"}, True),
    ],
)
def test_an_older_runs_data_must_be_what_it_was(
    tmp_path: Path, data: Path, changes: dict[str, Any], known: bool
) -> None:
    _, folder, recipe = run_in(tmp_path / "run", **{"data_path": str(data), **changes})
    found = checkpoint.pixels_of(folder, recipe)
    assert (found is not None) == known
    if found:
        assert "does not say by what its pixels were normalised" in found.remark
        assert len(found.mean) == recipe.channels


def photographs(folder: Path, levels: dict[str, int]) -> Path:
    """A class-per-folder set of the same noise around other levels."""
    for number, (name, level) in enumerate(levels.items()):
        noise = np.random.default_rng(number % 4).integers(-20, 20, (28, 28))
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray((noise + level).astype(np.uint8)).save(folder / "ab"[number % 2] / f"{name}.png")
    return folder


@pytest.mark.parametrize("known", [True, False])
def test_a_photograph_has_the_same_features_whatever_lies_beside_it(
    tmp_path: Path, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the run's own statistics, or by those of the first set, which are those of the training side."""
    run, folder, recipe = run_in(tmp_path / "run", data_path="")
    if known:
        note(folder, OWN)
    dark = {f"{n}": 40 for n in range(4)}
    sets = [
        photographs(tmp_path / "train", {f"{n}": 60 + 20 * n for n in range(8)}),
        photographs(tmp_path / "alone", dark),
        photographs(tmp_path / "both", dark | {f"bright{n}": 220 for n in range(4)}),
    ]
    model, _ = checkpoint.load_weights(run)
    rows = []
    for path in sets:
        loader = build_loader(path, recipe.loader_options(batch_size=8, train=False, num_workers=1))
        found = features(model, recipe, loader, "mean", torch.device("cpu"), quiet=True)
        names = [Path(name).stem for name in loader._images.paths]  # type: ignore[attr-defined]
        rows.append({names[int(i)]: row for i, row in zip(found.ids, found.rows, strict=True)})
        loader.close()
    for name in dark:
        torch.testing.assert_close(rows[1][name], rows[2][name])
    assert model.pixels == (OWN if known else statistics_of(read_info(sets[0])))
    said = f"nothing tells by what the model's pixels were normalised: all are by the mean and std of {sets[0]}"
    assert (said in capsys.readouterr().err) != known


def test_every_command_normalises_as_the_run_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a set that is nothing like the run's own."""
    run, folder, _ = run_in(tmp_path / "run", data_path="")
    note(folder, OWN)
    data = photographs(tmp_path / "data", {f"{n}": 60 + 20 * n for n in range(8)})
    seen: list[tuple[float, ...]] = []
    normalise = patches.NormalizedPatches.__init__

    def noting(self: Any, recipe: Recipe, statistics: Any) -> None:
        seen.append((*statistics.mean, *statistics.std))
        normalise(self, recipe, statistics)

    monkeypatch.setattr(patches.NormalizedPatches, "__init__", noting)
    out = iter(tmp_path / f"out{n}" for n in range(9))
    both = {"train_path": data, "val_path": data}
    commands = {
        "knn": lambda: fasthpm.knn(run, **both, output=tmp_path / "knn.json", batch_size=4),
        "linear": lambda: fasthpm.linear(
            run, **both, epochs=1, global_batch_size=4, batch_size=4, output_dir=str(next(out)), cache_features=True
        ),
        "maps": lambda: fasthpm.maps(run, data_path=data, output=next(out), true_loss=1, overlays=1),
        "embed": lambda: fasthpm.embed(run, data_path=data, output=tmp_path / "a.npz"),
        "visualize": lambda: visualize.main([str(run), "--data_path", str(data), "-o", str(next(out) / "a.png")]),
        "files": lambda: visualize.main(
            [str(run), "--images", str(data / "a" / "0.png"), "-o", str(next(out) / "a.png")]
        ),
    }
    for name, command in commands.items():
        seen.clear()
        command()
        assert seen, name
        assert set(seen) == {(0.3, 0.2)}, name
    settings = FineTune(output_dir=str(tmp_path / "tuned"))
    tuned = AugmentedLoader(str(data), Augmentation(), recipes.debug().loader_options(batch_size=4, num_workers=1))
    model = checkpoint.load_weights(run)[0]
    assert building.statistics_of_tuning(settings, model, tuned) == OWN
    (tmp_path / "tuned").mkdir()
    begun = PixelStatistics((0.1,), (0.4,))
    (tmp_path / "tuned" / checkpoint.FINETUNE_NOTES).write_text(json.dumps(begun.as_json()))
    assert building.statistics_of_tuning(settings, model, tuned) == begun  # goes on as it was
    exported = tmp_path / "encoder.safetensors"
    fasthpm.export(run, output=exported)
    assert encoders.of_file(exported, "", torch.device("cpu")).statistics == OWN
