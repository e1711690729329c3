"""`fasthpm visualize`: what it draws, and what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fasthpm import recipes
from fasthpm.errors import UserError
from fasthpm.pictures import drawing, panels, visualize
from tests.helpers.runs import lone_encoder, run_of


def test_visualize_draws_files(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folder / "noise.png"), str(folder / "wide.png")]
    columns = ["image", "true_loss", "predicted_loss", "hardest", "reconstruction"]
    visualize.main([str(run), "--images", *files, "--columns", *columns, "--attention", "-o", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] == 6 * (112 + drawing.GAP) + drawing.GAP
    shown = capsys.readouterr().out
    assert "difficulty masked_query (the run's own: paper), by the student; difficulty_spearman not measured" in shown
    visualize.main([str(run), "--images", *files, "--difficulty", "paper", "-o", str(tmp_path / "b.png")])
    assert "difficulty paper, by the student" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match="both say what to draw"):
        visualize.main([str(run), "--images", *files, "--data_path", "synthetic:9"])


MAE: dict[str, Any] = {"mask_policy": "random", "predict_loss": "none"}


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [({}, "image, attention"), (MAE, "image, mask, attention"), ({**MAE, "target": "ema"}, "image, mask, attention")],
)
def test_nothing_is_drawn_of_a_decoder_that_was_never_trained(
    changes: dict[str, Any], drawn: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture of an encoder that was imported alone does not change with the decoder's random weights."""
    recipe = dataclasses.replace(recipes.debug(), **changes)
    runs = [lone_encoder(tmp_path / f"run{seed}", recipe, seed) for seed in (1, 2)]
    images = ["--images", str(folder / "noise.png"), str(folder / "half.png")]
    for run in runs:
        visualize.main([str(run), *images, "-o", str(run / "a.png")])
        assert f"2 images ({drawn}) written to" in capsys.readouterr().out
    assert (runs[0] / "a.png").read_bytes() == (runs[1] / "a.png").read_bytes()
    every = {*panels.COLUMNS, *panels.MORE_COLUMNS}
    for column in sorted(every - {*drawn.split(", ")} - ({"reconstruction"} if "target" in changes else set())):
        with pytest.raises(UserError, match=rf"columns {column} need a decoder, and .*run1 was imported without its"):
            visualize.main([str(runs[0]), *images, "--columns", "image", column, "-o", str(tmp_path / "b.png")])
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("source", ["--images", "--data_path", "recipe"])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("set/a.png", "would overwrite what is read or was saved"),
        ("run/checkpoints/a.png", "would overwrite what is read or was saved"),
        ("folder.png", "which is a folder; name a file"),
        ("set/a.png/b.png", "would lie in .*a.png, and that is a file"),
        *(
            (name, r"expected a name that ends in \.png or \.gif")
            for name in ("o.jpg", "o.tif", "o", "run/recipe.json")
        ),
    ],
)
def test_a_place_that_cannot_be_is_told_before_the_work(
    source: str, output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is there stays as it is."""
    run, _ = run_of(tmp_path / "run", dataclasses.replace(recipes.debug(), data_path=str(tmp_path / "set")))
    for folder in ("set", "folder.png"):
        (tmp_path / folder).mkdir()
    for name in ("set/a.png", "run/checkpoints/a.png"):
        Image.new("L", (28, 28), 9).save(tmp_path / name)
    flags = {
        "--images": ["--images", str(tmp_path / "set/a.png")],
        "--data_path": ["--data_path", str(tmp_path / "set")],
    }

    def work(*_: object) -> None:
        raise RuntimeError("work was done")

    monkeypatch.setattr(visualize, "chosen_images", work)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        visualize.main([str(run), *flags.get(source, []), "-o", str(tmp_path / output)])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(RuntimeError, match="work was done"):
        visualize.main([str(run), *flags.get(source, []), "-o", str(tmp_path / "new.png")])


EFFECTS = [  # changes of the recipe, columns, flags that show in them, flags that do not
    ({}, "image", ["show"], ["alpha", "difficulty", "weights"]),
    ({}, "mask", ["alpha", "difficulty", "weights", "show"], []),
    ({}, "reconstruction", ["alpha", "difficulty", "weights", "show"], []),
    ({}, "predicted_loss", ["difficulty", "weights"], ["alpha", "show"]),
    ({}, "hardest", ["difficulty", "weights", "show"], ["alpha"]),
    ({}, "true_loss", ["weights"], ["alpha", "difficulty", "show"]),
    ({}, "attention", ["weights"], ["alpha", "difficulty", "show"]),
    (MAE, "mask", ["show"], ["alpha", "difficulty", "weights"]),
    (MAE, "reconstruction", ["weights", "show"], ["alpha", "difficulty"]),
]
VALUES = {"alpha": "0.25", "difficulty": "measured", "weights": "student", "show": "1"}


@pytest.mark.parametrize(("changes", "column", "shown", "idle"), EFFECTS)
def test_a_flag_that_no_column_shows_is_refused(
    changes: dict[str, Any], column: str, shown: list[str], idle: list[str], folder: Path, tmp_path: Path
) -> None:
    run, _ = run_of(tmp_path / "run", dataclasses.replace(recipes.debug(), **changes))
    line = [str(run), "--images", str(folder / "noise.png"), "--columns", column, "-o", str(tmp_path / "a.png")]
    for name in idle:
        with pytest.raises(UserError, match=rf"--{name} has no effect here: "):
            visualize.main([*line, f"--{name}", VALUES[name]])
    assert not (tmp_path / "a.png").exists()
    visualize.main([*line, *(word for name in shown for word in (f"--{name}", VALUES[name]))])
    assert (tmp_path / "a.png").exists()


def test_what_is_out_of_range_or_has_no_effect(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(run), "--images", str(folder / "noise.png"), "-o", str(tmp_path / "a.png")]
    for alpha in ("3", "-0.4", "1.01"):
        with pytest.raises(UserError, match=rf"alpha is {float(alpha)}, expected 0 to 1"):
            visualize.main([*line, "--alpha", alpha])
    with pytest.raises(UserError, match="--num_images has no effect here: every file of --images is drawn"):
        visualize.main([*line, "--num_images", "8"])
    assert not (tmp_path / "a.png").exists()
    visualize.main([*line, "--columns", "attention", "image", "image", "--attention"])  # named twice, drawn once
    assert "1 images (attention, image) written to" in capsys.readouterr().out
    for alpha in ("0", "1"):
        visualize.main([*line, "--alpha", alpha])
