"""Maps scored against object masks: whose mask is whose, and the scores."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasthpm.errors import UserError
from fasthpm.pictures.saliency import Saliency, auc, masks_of, precision_recall


def touched(folder: Path, *names: str) -> Path:
    """A folder with files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("missing", range(4))
def test_names_that_recur_in_other_folders_have_masks_of_their_own(root: bool, missing: int, tmp_path: Path) -> None:
    """Whichever mask is not there: its image has none, and the others keep theirs."""
    stems = ["a/1", "b/1", "b/c/1", "2"]
    names = [f"{tmp_path}/images/{stem}.jpg" for stem in stems]
    there = [stem for number, stem in enumerate(stems) if number != missing]
    masks = touched(tmp_path / "masks", *(f"{stem}.png" for stem in there), "notes.txt")
    found = masks_of(masks, names, str(tmp_path / "images") if root else "")
    assert found == {f"{tmp_path}/images/{stem}.jpg": masks / f"{stem}.png" for stem in there}


@pytest.mark.parametrize(
    ("masks", "names", "fits"),
    [
        (["1.png"], ["in/a/1.jpg", "in/b/2.jpg"], {"in/a/1.jpg": "1.png"}),
        (["1.png"], ["in/1.jpg", "in/b/1.jpg"], {"in/1.jpg": "1.png"}),
        (["1.png"], ["in/1.jpg", "in/1.jpg"], {"in/1.jpg": "1.png"}),
        (["1.png", "a/1.png"], ["in/1.jpg", "in/a/1.jpg"], {"in/1.jpg": "1.png", "in/a/1.jpg": "a/1.png"}),
        (["1.png", "a/1.png"], ["in/a/1.jpg", "in/b/2.jpg"], {"in/a/1.jpg": "a/1.png"}),
        (["a/1.png"], ["in/x/a/1.jpg", "in/2.jpg"], {"in/x/a/1.jpg": "a/1.png"}),
        (["1.png", "a/1.png"], ["in/a/1.jpg", "in/b/1.jpg"], r"mask .*/1.png fits 2 images"),
        (["1.png"], ["/in/1.jpg", "in/1.jpg"], r"mask .*/1.png fits 2 images"),
        (["1.tif", "a.b.png"], ["sample-1.png", "1", "a.b.png"], {"1": "1.tif", "a.b.png": "a.b.png"}),
        (["1.png"], ["in/a/1.jpg", "in/b/1.jpg"], r"mask .*/1.png fits 2 images, such as in/a/1.jpg and in/b/1.jpg"),
        (["1.png"], ["in/1.jpg", "in/1.png"], r"mask .*/1.png fits 2 images"),
        (["a/1.png"], ["in/x/a/1.jpg", "in/y/a/1.jpg"], r"mask .*/a/1.png fits 2 images"),
        (["1.png", "1.jpg"], ["in/1.jpg"], r"masks .*/1.jpg and .*/1.png have one name but for the ending; remove one"),
        (["x/1.png"], ["in/1.jpg"], r"no file of --masks is named like an image: there are in/1.jpg, and masks like"),
        (["z.png"], ["in/1.jpg"], r"no file of --masks is named like an image"),
        (["1.txt"], ["in/1.jpg"], r"no file of --masks is named like an image: there are images, and no masks"),
    ],
)
def test_whose_mask_is_whose(masks: list[str], names: list[str], fits: dict[str, str] | str, tmp_path: Path) -> None:
    """By the path within the folder; by a name alone only where no other image has it."""
    touched(tmp_path, *masks)
    if isinstance(fits, str):
        with pytest.raises(UserError, match=fits):
            masks_of(tmp_path, names, "in")
    else:
        assert masks_of(tmp_path, names, "in") == {name: tmp_path / mask for name, mask in fits.items()}


def test_a_map_that_is_the_mask_scores_best(tmp_path: Path) -> None:
    inside = np.zeros((28, 28), np.uint8)
    inside[4:12, 8:20] = 255
    Image.fromarray(inside).save(tmp_path / "a.png")
    for maps, area, best in (
        (inside[::4, ::4] / 255.0, 1.0, 1.0),
        (1 - inside[::4, ::4] / 255.0, 0.0, None),
        (np.zeros((7, 7)), 0.5, None),
    ):
        saliency = Saliency(tmp_path, (28, 28), ["x/a.jpg", "unknown.jpg"])
        saliency.add("x/a.jpg", {"predicted": maps})
        saliency.add("unknown.jpg", {"predicted": maps})
        scores = saliency.scores()["predicted"]
        assert scores["auc"] == area
        assert scores["images"] == 1
        assert best is None or scores["max_f"] == pytest.approx(best)


def test_auc_counts_pairs() -> None:
    numbers = np.random.default_rng(3)
    values, inside = numbers.integers(0, 6, 40).astype(float), numbers.random(40) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in values[inside] for b in values[~inside]]
    assert auc(values, inside) == pytest.approx(np.mean(pairs))
    curve = precision_recall(values, inside)
    for level in range(1, 6):
        chosen = values >= level
        want = (inside & chosen).sum() / chosen.sum(), (inside & chosen).sum() / inside.sum()
        place = 255 - int((level - values.min()) / (values.max() - values.min()) * 255)
        np.testing.assert_allclose(curve[:, place], want)
