"""The dense probe as a command: figures, files, baselines, and what it refuses."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from fasthpm import recipes
from fasthpm.checkpoint.weights import load_weights
from fasthpm.dense import patchwise, probe
from fasthpm.dense.pairs import IGNORED, PairFiles, open_pairs
from fasthpm.ranks import Launch
from fasthpm.recipe import Recipe
from tests.helpers.finetuning import read, refused, start
from tests.helpers.pairs import GARMENTS, ade, own, write
from tests.helpers.runs import run_of
from tests.helpers.videos import tiny

COLOURS = np.array([[20, 20, 20], [200, 30, 30], [30, 180, 40], [40, 60, 220], [230, 220, 60]])


def recipe(**changes: object) -> Recipe:
    small = {"input_size": "16", "patch_size": 4, "channels": 3, **changes}
    return dataclasses.replace(recipes.debug(), **small)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("dense") / "run", recipe())[0]


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of another size than the run's, whose blocks have a class's colour, with some noise; few are ignored."""
    root, rng = tmp_path_factory.mktemp("easy"), np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 9)):
        for number in range(count):
            classes = rng.choice(5, (4, 4), p=(0.6, 0.1, 0.1, 0.1, 0.1)).astype(np.uint8)
            mask = classes.repeat(8, 0).repeat(8, 1)
            noise = rng.integers(-15, 16, (32, 32, 3))
            write(root / split / "images" / f"{number}.png", np.clip(COLOURS[mask] + noise, 0, 255).astype(np.uint8))
            mask[:8, :8] = 255
            write(root / split / "masks" / f"{number}.png", mask)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in GARMENTS))
    return root


def test_what_patches_show_is_found(run: Path, easy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Colours tell all: both classifiers find them, and no baseline does."""
    found = probe.main([str(run), "--data_path", str(easy), "--weights", "student", "untrained"])
    shown = capsys.readouterr()
    assert "| majority |" in shown.out
    assert "mask values are 0 (background) to 4 (boot), and 255 (ignored)" in shown.err
    assert found.miou > 95
    assert found.knn_miou > 90
    made = read(run / "dense" / "student" / "result.json")
    assert found.files[0] == run / "dense" / "student" / "result.json"
    assert made["miou"] == pytest.approx(found.miou, abs=1e-3)
    assert made["train"] == {"source": str(easy), "images": 30, "patches": 30 * 15, "ignored": 30}
    assert made["val"]["patches"] == 9 * 15
    assert len(made["checkpoint_hash"]) == 64
    figures = made["figures"]
    assert figures["majority"]["accuracy"] < 75
    assert figures["chance"]["miou"] < 30
    assert figures["linear"]["pixel_miou"] == pytest.approx(figures["linear"]["miou"], abs=1e-3)  # patches of one class
    assert [row["class"] for row in made["classes"]] == ["background", *GARMENTS]
    assert sum(row["patches"] for row in made["classes"]) == 9 * 15
    text = (run / "dense" / "student" / "result.md").read_text()
    assert "| trousers |" in text
    assert "| linear |" in text
    with Image.open(run / "dense" / "student" / "examples.png") as picture:
        assert picture.width > 500
    untrained = read(run / "dense" / "untrained" / "result.json")
    assert untrained["effective_epochs"] == 0
    assert untrained["figures"]["majority"] == figures["majority"]
    assert untrained["weights"] == "untrained"


def test_the_figures_are_those_of_the_predictions(run: Path, easy: Path, tmp_path: Path) -> None:
    """By scikit-learn, from the classifiers alone, over patches and over pixels; the same command says the same."""
    words = (run, "--data_path", easy, "--limit", "12", "--output_dir", tmp_path)
    start(probe, *words)
    made = read(tmp_path / "student" / "result.json")
    model, its = load_weights(run)
    sets = [open_pairs(PairFiles(str(easy)), split, limit=12) for split in ("train", "val")]
    encoder = patchwise.PatchEncoder(model, its, sets[0], torch.device("cpu"))
    train, val = (encoder.whole(pairs) for pairs in sets)
    for name, one in probe.classify(train, val, 5, 16).items():
        known = val.labels != IGNORED
        truth, guessed = val.labels[known].numpy(), one.labels[known].numpy()
        assert made["figures"][name]["miou"] == pytest.approx(
            100 * jaccard_score(truth, guessed, average="macro"), abs=1e-3
        )
        assert made["figures"][name]["accuracy"] == pytest.approx(100 * (truth == guessed).mean(), abs=1e-3)
        pixels = [np.repeat(np.arange(5), row[:5]) for row in val.counts.tolist()]
        all_guessed = np.concatenate([np.full(len(row), label) for row, label in zip(pixels, one.labels, strict=True)])
        jaccard = jaccard_score(np.concatenate(pixels), all_guessed, average="macro")
        assert made["figures"][name]["pixel_miou"] == pytest.approx(100 * jaccard, abs=1e-3)
    before = made["figures"]
    start(probe, *words)
    assert read(tmp_path / "student" / "result.json")["figures"] == before


def test_the_held_out_tenth_is_of_whole_images() -> None:
    labels = torch.arange(30 * 4) // 4
    labels[5] = IGNORED
    rows = torch.arange(30 * 4)[:, None].float()
    some, held = probe.split_off(patchwise.Patches(rows, labels, rows.long()), 4)
    assert held.labels.unique().tolist() == [9, 19, 29]
    assert len(some.labels) == 27 * 4 - 1
    few = probe.split_off(patchwise.Patches(rows[:8], labels[:8], rows[:8].long()), 4)
    assert [part.labels.unique().tolist() for part in few] == [[0], [1]]


def test_any_layout_and_grey_runs(run: Path, easy: Path, tmp_path: Path) -> None:
    grey = run_of(tmp_path / "grey", recipe(channels=1))[0]
    start(probe, grey, "--data_path", easy)
    assert read(grey / "dense" / "student" / "result.json")["figures"]["linear"]["accuracy"] > 60
    flags: list[Any] = []
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            flags += [f"--{split}_{kind}", easy / split / kind]
    flags += ["--classes", easy / "classes.txt", "--background", "ignore", "--output_dir", tmp_path / "own"]
    start(probe, run, *flags)
    made = read(tmp_path / "own" / "student" / "result.json")
    assert [row["class"] for row in made["classes"]] == list(GARMENTS)
    assert made["val"]["ignored"] > 9 * 4
    masks = [np.full((16, 16), 1 + number % 3, np.uint8) for number in range(12)]
    start(probe, run, "--data_path", ade(tmp_path / "ade", masks), "--output_dir", tmp_path / "out")
    rows = read(tmp_path / "out" / "student" / "result.json")["classes"]
    assert len(rows) == 150
    assert rows[50] == {"class": "class 51", "patches": 0, "k-NN": None, "linear": None}


def test_what_does_not_fit_is_one_line(run: Path, easy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("--data_path", easy)
    assert "has no teacher weights" in refused(probe, run, *data, "--weights", "teacher")
    video = run_of(tmp_path / "video", tiny())[0]
    assert "is of videos, and the dense probe is for images" in refused(probe, video, *data)
    assert "--data_path is missing" in refused(probe, run)
    (tmp_path / "file").write_text("")
    for place in ("file", "file/deep"):
        said = refused(probe, run, *data, "--output_dir", tmp_path / place)
        assert said.endswith(f"would lie in {tmp_path / 'file'}, and that is a file; choose another")
    assert "limit is -1, expected 0 or more" in refused(probe, run, *data, "--limit", "-1")
    assert "has 1 image to train on, expected 2 or more" in refused(probe, run, *data, "--limit", "1")
    half_ignored = tmp_path / "half"
    for split in ("train", "val"):  # a pixel in each patch has a label, so that masks are not all ignored
        options = own(half_ignored / split, [np.pad([[1]], (0, 15), constant_values=255).astype(np.uint8)] * 3)
    (half_ignored / "classes.txt").write_text(Path(options["classes"]).read_text())
    assert "has a label: all are mostly ignored" in refused(probe, run, "--data_path", half_ignored)

    @contextlib.contextmanager
    def two_ranks() -> Iterator[Launch]:
        yield Launch(0, 0, 2, 2, torch.device("cpu"))

    monkeypatch.setattr(probe.ranks, "session", two_ranks)
    assert "2 ranks, and the dense probe uses one; start it without a launcher" in refused(probe, run, *data)
