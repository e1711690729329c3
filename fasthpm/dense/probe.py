"""Dense probe: how much a frozen encoder's patches tell of what is where, in a minute.

    fasthpm dense RUN --data_path SCENES                                # {train,val}/{images,masks}/, classes.txt
    fasthpm dense RUN --data_path ADEChallengeData2016 --limit 0        # all of ADE20K
    fasthpm dense RUN --data_path SCENES --weights student untrained    # what pretraining brought
    fasthpm dense RUN --train_images A --train_masks B --val_images C --val_masks D --classes FILE --background class

Two classifiers learn from the patches of the training images and are tested on those of the others. The protocol is
that of CAPI's segmentation probe (Darcet et al. 2025, eval_segmentation.py). As there: images are resized to the
model's size whatever their proportions (bicubic, masks nearest); the label of a patch is the class of most of its
pixels, and patches that are mostly ignored are left out; features are those after the encoder's last norm,
standardised by the training patches' mean and deviation; k-NN is an unweighted vote, k of 1, 3, 10, 30; linear is
logistic regression by L-BFGS with an L2 penalty; k and the penalty are those with the best mIoU on a tenth of the
training images, and the classifier then learns from all of them; mIoU is the mean over classes that occur or are
predicted.

Ours: cosine similarity alone (CAPI tries L2, too); four penalties (CAPI eight) and 100 iterations each (CAPI 1000);
neighbours vote with the class of their patch (CAPI's with every pixel's, place by place); figures are over patches,
and beside them over pixels, each with the class of its patch, as CAPI counts; the held-out tenth is every tenth image;
and by default --limit takes 500 images of each split, evenly spread, where CAPI takes all.

"majority" predicts the most frequent class everywhere, "chance" guesses classes as often as they occur in training:
a probe has to be better. RUN/dense/WEIGHTS/ receives result.json, result.md with a row per class, and examples.png.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasthpm import files, ranks
from fasthpm.checkpoint.weights import load_weights, run_of
from fasthpm.cli import Arguments, Parser
from fasthpm.data.shown import Shown
from fasthpm.data.statistics import PixelStatistics
from fasthpm.data.values import Values
from fasthpm.dense.classifiers import fit_all, fit_logistic, nearest_votes, scaler_of
from fasthpm.dense.confusion import by_chance, frequencies, of_pixels
from fasthpm.dense.pairs import IGNORED, PairFiles, PairSet, open_pairs
from fasthpm.dense.patchwise import PatchEncoder, Patches, read_resized
from fasthpm.dense.segmentation import testing
from fasthpm.dense.segmentation.pictures import Example, save
from fasthpm.dense.values import shown_once
from fasthpm.entry import Result
from fasthpm.errors import UserError, note_once
from fasthpm.options import add_recipe_arguments, option, validate
from fasthpm.probes import result

WEIGHTS = ("student", "teacher", "untrained")
HELD_OUT = 10  # every how many-th training image says which k and which penalty are the best
SHOWN = 6  # images in examples.png
PROTOCOL = "dense probe (CAPI's: k-NN and logistic regression on frozen patches)"


@dataclass(frozen=True)
class DenseProbe(PairFiles):
    """What is asked for, beside the run."""

    limit: int = option(500, "images of each split, evenly spread over it; 0 = all", low=0)
    output_dir: str = option("", "folder for results; empty = RUN/dense", run_only=True)
    show: str = option("", "channels that examples.png shows, from 1 or by names of bands: 3,2,1", run_only=True)
    num_workers: int = option(0, "threads that read images; 0 = cores", low=0, run_only=True)

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, repr=False)
class DenseProbeResult(Result):
    """Figures in percent over patches, of the first weights that were asked for: linear's, and k-NN's."""

    miou: float
    accuracy: float
    knn_miou: float
    knn_accuracy: float
    k: int
    figures: dict[str, dict[str, dict[str, float]]]  # of weights: of k-NN, linear, majority, chance
    files: tuple[Path, ...]


class Predictions(NamedTuple):
    """What a classifier says of the test patches, and with which number of neighbours or penalty."""

    labels: Tensor  # int64 [N]
    chosen: float


# -------------------------------------------------------------------------------------------------- the two classifiers
def split_off(patches: Patches, per_image: int) -> tuple[Patches, Patches]:
    """Patches to learn from, and those of every tenth image, of two or more always one; without ignored ones."""
    image = torch.arange(len(patches.labels), device=patches.labels.device) // per_image
    held = image % HELD_OUT == min(HELD_OUT, int(image[-1]) + 1) - 1
    known = patches.labels != IGNORED
    return tuple(Patches(*(column[part & known] for column in patches)) for part in (~held, held))  # type: ignore[return-value]


def best_of(predictions: dict[float, Tensor], truth: Patches, num_classes: int) -> float:
    """The number whose predictions have the best mIoU, of several the first."""
    tables = {number: testing.confusion(truth.labels, labels, num_classes) for number, labels in predictions.items()}
    return max(tables, key=lambda number: testing.figures(tables[number])["miou"])


def classify(train: Patches, test: Patches, num_classes: int, per_image: int) -> dict[str, Predictions]:
    """Both classifiers' predictions for the patches `test`, learned from `train`; numbers chosen on a part of that."""
    scaled = scaler_of(train.rows[train.labels != IGNORED])
    train, test = (patches._replace(rows=scaled(patches.rows)) for patches in (train, test))
    some, held = split_off(train, per_image)
    known = train.labels != IGNORED
    bank, labels = train.rows[known], train.labels[known]
    votes = nearest_votes(some.rows, some.labels, held.rows, num_classes)
    k = int(best_of({float(number): found for number, found in votes.items()}, held, num_classes))
    knn = nearest_votes(bank, labels, test.rows, num_classes, [k])
    fitted = fit_all(some.rows, some.labels, num_classes)
    penalty = best_of({number: linear(held.rows) for number, linear in fitted.items()}, held, num_classes)
    linear = fit_logistic(bank, labels, num_classes, penalty, fitted[penalty])
    return {"k-NN": Predictions(next(iter(knn.values())), k), "linear": Predictions(linear(test.rows), penalty)}


# -------------------------------------------------------------------------------------------------- figures
def read_off(patches: Tensor, pixels: Tensor) -> dict[str, float]:
    """mIoU and accuracy over patches and over pixels in percent, from a table of each."""
    found = {"": testing.figures(patches), "pixel_": testing.figures(pixels)}
    return {
        f"{of}{ours}": found[of][theirs] for of in found for ours, theirs in (("miou", "miou"), ("accuracy", "aacc"))
    }


def figures_of(truth: Patches, predicted: Tensor, num_classes: int) -> dict[str, float]:
    """mIoU and accuracy of predicted classes, int64 [N]."""
    return read_off(testing.confusion(truth.labels, predicted, num_classes), of_pixels(truth.counts, predicted))


def baselines(train: Patches, test: Patches, num_classes: int) -> dict[str, dict[str, float]]:
    """What needs no features: the most frequent class everywhere, and guesses as frequent as classes are."""
    often, there = (frequencies(patches.labels, num_classes) for patches in (train, test))
    constant = torch.full_like(test.labels, int(often.argmax()))
    pixels = test.counts[:, :num_classes].sum(0)
    chance = read_off(by_chance(there, often), by_chance(pixels, often))
    return {"majority": figures_of(test, constant, num_classes), "chance": chance}


def per_class(test: Patches, found: dict[str, Predictions], classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row per class: its patches, and its IoU by both classifiers; None where it neither occurs nor is predicted."""
    ious = {
        name: testing.class_figures(testing.confusion(test.labels, one.labels, len(classes)))[0].tolist()
        for name, one in found.items()
    }
    count = frequencies(test.labels, len(classes)).tolist()
    return [
        {"class": name, "patches": count[k]} | {way: _rounded(values[k]) for way, values in ious.items()}
        for k, name in enumerate(classes)
    ]


def _rounded(value: float) -> float | None:
    return round(value, 3) if value == value else None


# -------------------------------------------------------------------------------------------------- the command
def open_sets(settings: DenseProbe, channels: int, values: Values) -> tuple[PairSet, PairSet]:
    """Training and test images. **Raises:** `UserError` for what `open_pairs` refuses, and too few images."""
    train, val = (
        open_pairs(settings, split, channels=channels, limit=settings.limit, values=values)
        for split in ("train", "val")
    )
    if len(train) < 2:
        raise UserError(f"{train.source} has {len(train)} image to train on, expected 2 or more; add some")
    return train, val


def evaluate(run: Path, weights: str, settings: DenseProbe, launch: ranks.Launch) -> dict[str, Any]:
    """Everything about the encoder with these weights, as result.json has it, its files written."""
    begin = time.perf_counter()
    model, recipe = load_weights(run, weights)
    if model.video:
        raise UserError(f"{run} is of videos, and the dense probe is for images; give an image run")
    pixels = model.pixels or PixelStatistics((0.0,) * model.in_chans, (1.0,) * model.in_chans)
    shown = shown_once(pixels, settings.show)
    train_set, val_set = open_sets(settings, recipe.channels, pixels.values)
    note_once(f"mask values are {train_set.words}")
    encoder = PatchEncoder(model, recipe, train_set, launch.device)
    train, val = (encoder.whole(pairs, settings.num_workers) for pairs in (train_set, val_set))
    _check_labels(train, val, train_set, val_set)
    count, per_image = len(val_set.classes), recipe.num_patches
    found = classify(train, val, count, per_image)
    figures = {name: figures_of(val, one.labels, count) for name, one in found.items()}
    figures |= baselines(train, val, count)
    folder = folder_of(run, settings) / weights
    draw(folder / "examples.png", encoder, val_set, val.labels, found["linear"].labels, shown)
    seconds = time.perf_counter() - begin
    made = {
        "protocol": PROTOCOL,
        "weights": weights,
        "miou": round(figures["linear"]["miou"], 4),
        "accuracy": round(figures["linear"]["accuracy"], 4),
        "k": int(found["k-NN"].chosen),
        "C": found["linear"].chosen,
        "figures": {name: {key: round(value, 4) for key, value in one.items()} for name, one in figures.items()},
        "classes": per_class(val, found, val_set.classes),
        "train": _facts(train_set, train),
        "val": _facts(val_set, val),
        "settings": dataclasses.asdict(settings),
        "seconds": round(seconds, 1),
        "gpu_hours": round(seconds / 3600, 4),
        **result.provenance(run, launch),
    }
    if weights == "untrained":
        made |= {"effective_epochs": 0, "pretraining_gpu_hours": 0}
    write(folder, made)
    return made


def _facts(pairs: PairSet, patches: Patches) -> dict[str, Any]:
    labelled = int((patches.labels != IGNORED).sum())
    return {
        "source": pairs.source,
        "images": len(pairs),
        "patches": labelled,
        "ignored": len(patches.labels) - labelled,
    }


def _check_labels(train: Patches, val: Patches, train_set: PairSet, val_set: PairSet) -> None:
    """Refuse sets without labelled patches, and training sets of which the held-out or the other images have none."""
    for patches, pairs in ((train, train_set), (val, val_set)):
        if (patches.labels == IGNORED).all():
            raise UserError(
                f"no patch of {pairs.source} ({len(pairs)} images) has a label: all are mostly ignored; expected "
                f"{pairs.words}"
            )
    if min(len(part.labels) for part in split_off(train, len(train.labels) // len(train_set))) == 0:
        raise UserError(f"too few of the {len(train_set)} training images of {train_set.source} have labels; use more")


def folder_of(run: Path, settings: DenseProbe) -> Path:
    """Where results go."""
    return Path(settings.output_dir) if settings.output_dir else run_of(run) / "dense"


# -------------------------------------------------------------------------------------------------- files
def draw(path: Path, encoder: PatchEncoder, pairs: PairSet, truth: Tensor, predicted: Tensor, shown: Shown) -> None:
    """Some images, the labels of their patches, and what linear says of them; labels are int64 [images x L]."""
    samples = np.unique(np.linspace(0, len(pairs) - 1, SHOWN).astype(int)).tolist()
    images = [shown.first(image) for image in read_resized(pairs, samples, encoder.size).images]
    rows, columns = (length // encoder.side for length in encoder.size)
    grids = [labels.cpu().numpy().astype(np.uint8).reshape(-1, rows, columns)[samples] for labels in (truth, predicted)]
    pixels = [grid.repeat(encoder.side, 1).repeat(encoder.side, 2) for grid in grids]
    save([Example(*one) for one in zip(images, *pixels, strict=True)], pairs.classes, path)


def write(folder: Path, made: dict[str, Any]) -> None:
    """result.json and result.md. **Raises:** `UserError` if the disk does not take them."""
    result.write_text(folder / "result.json", json.dumps(made, indent=2) + "\n")
    rows = ["| class | patches | k-NN IoU | linear IoU |", "|---|---|---|---|"]
    for row in made["classes"]:
        cells = ("" if row[way] is None else f"{row[way]:.2f}" for way in ("k-NN", "linear"))
        rows.append(f"| {row['class']} | {row['patches']} | {' | '.join(cells)} |")
    head = f"| {' | '.join(result.SHOWN)} |\n|{'---|' * len(result.SHOWN)}\n{result.markdown_row(made)}"
    result.write_text(folder / "result.md", "\n\n".join([head, table_of(made), "\n".join(rows)]) + "\n")


def table_of(made: dict[str, Any]) -> str:
    """The figures as a table in Markdown."""
    chosen = {"k-NN": f"k = {made['k']}", "linear": f"C = {made['C']:g}"}
    rows = [
        f"| {made['weights']} | mIoU | accuracy | mIoU of pixels | accuracy of pixels | |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in made["figures"].items():
        cells = " | ".join(f"{one[key]:.2f}" for key in ("miou", "accuracy", "pixel_miou", "pixel_accuracy"))
        rows.append(f"| {name} | {cells} | {chosen.get(name, '')} |")
    return "\n".join(rows)


def parse_arguments(argv: Arguments) -> tuple[Path, list[str], DenseProbe]:
    """The run, the weights and the rest. **Raises:** `UserError` for values out of range."""
    parser = Parser(prog="fasthpm dense", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run or import, or one of its checkpoints")
    parser.add_argument(
        "--weights", choices=WEIGHTS, nargs="+", default=["student"], help="which encoder; several give several results"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add_recipe_arguments(parser, DenseProbe)
    parser.epilog = None
    given = vars(parser.parse_args(argv))
    given.pop("local_rank")
    run, weights = given.pop("run"), given.pop("weights")
    return run, list(dict.fromkeys(weights)), DenseProbe(**given)


def main(argv: Arguments = None) -> DenseProbeResult:
    """`fasthpm dense`."""
    run, weights, settings = parse_arguments(argv)
    with ranks.session() as launch:
        if launch.world_size > 1:
            raise UserError(f"{launch.world_size} ranks, and the dense probe uses one; start it without a launcher")
        for name in weights:
            files.check_above(folder_of(run, settings) / name, "output_dir")
        made = [evaluate(run, one, settings, launch) for one in weights]
    for one in made:
        print(f"{table_of(one)}\n")
    folder = folder_of(run, settings)
    print(f"written to {folder}/{{{','.join(weights)}}}/", file=sys.stderr)
    linear, knn = (made[0]["figures"][name] for name in ("linear", "k-NN"))
    return DenseProbeResult(
        linear["miou"],
        linear["accuracy"],
        knn["miou"],
        knn["accuracy"],
        made[0]["k"],
        {one["weights"]: one["figures"] for one in made},
        tuple(folder / name / "result.json" for name in weights),
    )
