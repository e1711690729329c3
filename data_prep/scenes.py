"""Garments on photographs: a seeded test set with exact truth, made without a network.

    python -m data_prep.scenes OUT --number 20000 --val_number 4000 --size 64 --seed 0
    python -m data_prep.images OUT/train.txt OUT/train.beton --write_mode raw --classes OUT/classes.txt

This is no benchmark: nobody has published figures on it. It is small, its labels, boxes and masks are exact because it
is drawn, and any machine with Debian's packages can make it again. Fashion-MNIST's garments, in grey or tinted, are
pasted with soft edges on random crops of real photographs (`data_prep.photographs`). train and val have different
photographs and different garments, those of Fashion-MNIST's own splits.

OUT/{train,val}/images/NAME.png    RGB
OUT/{train,val}/masks/NAME.png     class of every pixel: 0 ground, 1..10 the garments in the order of classes.txt
OUT/{train,val}/objects/NAME.png   255 where a garment is, what `fasthpm maps --masks` reads
OUT/annotations/{train,val}.json   COCO's form: boxes, areas, run-length masks, class 1..10 of every garment
OUT/{train,val}.txt                path and class of the largest garment, what `data_prep.images` reads
OUT/classes.txt                    the classes by name, 1 first

A pixel is a garment's if more than half of it is; where garments overlap, the upper one's. Every image is a function of
seed, split and number alone (and of the files). OUT appears when all is there.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.encode import check_opencv
from data_prep.fashion_mnist import CLASSES, find_source, read_split
from data_prep.pasting import DARKEST, SOFT_EDGE, cut_out, enlarge, paste
from data_prep.photographs import photographs, read_source, sources
from data_prep.pool import AHEAD, asked_to_stop, become_worker, fork, in_order
from data_prep.sets import progress_bar
from fasthpm.cli import Parser, run_command
from fasthpm.data.keys import Stream
from fasthpm.data.options import count_workers
from fasthpm.data.sampling import Array, key_of, uniforms
from fasthpm.errors import UserError
from fasthpm.files import replacing, write_text, writing

STREAMS = {"train": 3, "val": 4}  # in the place of an epoch in the keys of what is drawn; moving garments have 1 and 2
VALIDATION = 4  # every how many-th photograph is val's
SHORTER_SIDE = 1200  # pixels that photographs are shrunk to
CLOSEST = 1.5  # a crop is shrunk at least so much, because single pixels of photographs are soft
BLOCKS, CONTRAST, TEXTURED = 8, 6.0, 0.7  # a crop's blocks a side; deviation of grey in one; share that must have it
TRIES = 12  # crops per image, of which the first textured one, or else the most textured one, is taken
PROBES, PROBE_SIDE, FEWEST_TEXTURED = 24, 64, 4  # a photograph is used if so many crops of this side are textured
SMALLEST, LARGEST = 0.3, 0.6  # a garment's longer side, as a share of the image's
GREY, DIMMEST = 0.25, 0.3  # share of garments without a tint; least of the other two channels of a tint
MOST, PLACES = 10, 8  # garments of an image; places tried for one, of which the one that hides least is taken
BOX, GARMENT = 4, 8 + 2 * PLACES  # numbers drawn per crop, and per garment
IMAGES = (len(CLASSES), 10**8 - 1)  # of a split: one of each class, and what the names have digits for
RANGES = {"number": IMAGES, "val_number": IMAGES, "size": (32, 512), "seed": (0, 2**63 - 1), "num_workers": (0, 1024)}
CHUNK = 64  # images handed to a process at a time
KINDS = ("images", "masks", "objects")


@dataclass(frozen=True)
class Material:
    """What the scenes of a split are made of."""

    photographs: Sequence[Image.Image]
    garments: Array  # uint8 [N, 28, 28]
    of_class: Sequence[Array]  # numbers of the garments of each class


@dataclass(frozen=True)
class Scene:
    """An image and the truth about it."""

    pixels: Array  # uint8 [S, S, 3]
    labels: tuple[int, ...]  # class of every garment that is seen, from 0
    masks: Array  # bool [garments, S, S], disjoint

    @property
    def label(self) -> int:
        """The class of the garment with most pixels, of several the first."""
        return self.labels[int(self.masks.sum((1, 2)).argmax())]

    @property
    def classes(self) -> Array:
        """0 or the class of every pixel, from 1: uint8 [S, S]."""
        return (self.masks * (1 + np.array(self.labels, np.uint8))[:, None, None]).sum(0).astype(np.uint8)


# -------------------------------------------------------------------------------------------------- material
def texture(pixels: Array) -> float:
    """Share of the blocks of uint8 [S, S, 3] in which there is something to see."""
    grey = pixels.mean(2)
    side = len(grey) // BLOCKS
    blocks = grey[: side * BLOCKS, : side * BLOCKS].reshape(BLOCKS, side, BLOCKS, side)
    return float((blocks.std((1, 3)) >= CONTRAST).mean())


def crop(photograph: Image.Image, size: int, draws: Array) -> Array:
    """A square of `photograph` at a place and a scale that `draws`, [3] in 0..1, say: uint8 [size, size, 3]."""
    shorter = min(photograph.size)
    side = size * CLOSEST * (shorter / (size * CLOSEST)) ** draws[0]
    left, top = (draws[1:] * (np.array(photograph.size) - side)).tolist()
    box = (left, top, left + side, top + side)
    return np.asarray(photograph.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3.0))


def read_photograph(file: Path) -> Image.Image:
    """A photograph with a shorter side of `SHORTER_SIDE` at most. **Raises:** `UserError` if it is damaged."""
    try:
        image = read_source(file)
    except OSError as error:
        raise UserError(f"photograph {file} cannot be read ({error}); install its package again") from error
    ratio = min(SHORTER_SIDE / min(image.size), 1.0)
    return image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)


def read_photographs(files: Sequence[Path]) -> dict[str, list[Image.Image]]:
    """Those with texture, every `VALIDATION`-th for val. Who is on which side depends on the files alone.

    **Raises:** `UserError` if one side would have none.
    """
    found = []
    with progress_bar(len(files), "look", "photograph") as bar:
        for number, file in enumerate(files):
            photograph = read_photograph(file)
            draws = uniforms(key_of(0, 0, Stream.PREPARATION), np.array([number]), PROBES * BOX).reshape(PROBES, BOX)
            shares = [texture(crop(photograph, PROBE_SIDE, draw[1:])) for draw in draws]
            if sum(share >= TEXTURED for share in shares) >= FEWEST_TEXTURED:
                found.append(photograph)
            bar.update()
    if len(found) < VALIDATION:
        raise UserError(
            f"{len(found)} of {len(files)} photographs have texture, expected {VALIDATION} or more; install more"
        )
    return {
        "train": [photograph for number, photograph in enumerate(found, 1) if number % VALIDATION],
        "val": found[VALIDATION - 1 :: VALIDATION],
    }


def read_garments(split: str, source: Path) -> tuple[Array, list[Array]]:
    """Images of a split, uint8 [N, 28, 28], and the numbers of those of each class.

    **Raises:** `UserError` if a class has none.
    """
    images, labels = read_split(split, source)
    seen = images.max((1, 2)) >= DARKEST
    of_class = [np.flatnonzero((labels == label) & seen) for label in range(len(CLASSES))]
    missing = [name for name, numbers in zip(CLASSES, of_class, strict=True) if not len(numbers)]
    if missing:
        raise UserError(f"{source} has no {missing[0]} in {split}; download it again")
    return images, of_class


# -------------------------------------------------------------------------------------------------- one scene
def draw_scene(material: Material, key: Array, number: int, size: int, objects: tuple[int, int]) -> Scene:
    """Image `number` of a split: a ground, and garments one over the other, from the numbers that `key` gives.

    The first garment's class is the remainder of `number`, so that every class has its share.
    """
    draws = uniforms(key, np.array([number]), 1 + TRIES * BOX + MOST * GARMENT)[0]
    low, high = objects
    count = low + int(draws[0] * (high - low + 1))
    canvas = draw_ground(material.photographs, draws[1 : 1 + TRIES * BOX].reshape(TRIES, BOX), size)
    labels: list[int] = []
    masks = np.zeros((0, size, size), bool)
    for row, draw in enumerate(draws[1 + TRIES * BOX :].reshape(MOST, GARMENT)[:count]):
        label = int(draw[0] * len(CLASSES)) if row else number % len(CLASSES)
        mask = draw_garment(material, label, canvas, masks, draw[1:])
        masks = np.concatenate([masks & ~mask, mask[None]])
        labels.append(label)
    seen = np.flatnonzero(masks.any((1, 2)))
    return Scene(canvas, tuple(labels[row] for row in seen), masks[seen])


def draw_ground(photographs: Sequence[Image.Image], draws: Array, size: int) -> Array:
    """The first crop with texture, or the one with most: uint8 [size, size, 3], writable.

    - `draws`: [TRIES, BOX] in 0..1
    """
    best, most = np.zeros(0), -1.0
    for draw in draws:
        pixels = crop(photographs[int(draw[0] * len(photographs))], size, draw[1:])
        share = texture(pixels)
        if share > most:
            best, most = pixels, share
        if share >= TEXTURED:
            break
    return best.copy()


def draw_garment(material: Material, label: int, canvas: Array, masks: Array, draws: Array) -> Array:
    """Paste a garment on uint8 `canvas` [S, S, 3] where it hides the others least; returns its mask, bool [S, S].

    - `masks`: bool [garments, S, S], of those there
    - `draws`: [GARMENT - 1] in 0..1
    """
    size, numbers = len(canvas), material.of_class[label]
    image = material.garments[numbers[int(draws[0] * len(numbers))]]
    longest = round(size * (SMALLEST + draws[1] * (LARGEST - SMALLEST)))
    grey, opacity = enlarge(cut_out(image), longest, draws[2] < 0.5)
    colours = DIMMEST + draws[4:7] * (1 - DIMMEST)
    tint = np.ones(3) if draws[3] < GREY else colours / colours.max()
    room = size - np.array(grey.shape) + 1
    places = (draws[7:].reshape(PLACES, 2) * room).astype(int).tolist()
    hidden = [_hidden(masks, opacity, place) for place in places]
    return paste(canvas, grey, opacity, tuple(places[int(np.argmin(hidden))]), tint)


def _hidden(masks: Array, opacity: Array, place: Sequence[int]) -> float:
    """The largest share of a garment there that one at `place` would hide."""
    (top, left), (height, width) = place, opacity.shape
    window = masks[:, top : top + height, left : left + width]
    covered = (window & (opacity > SOFT_EDGE)).sum((1, 2))
    return float((covered / np.maximum(masks.sum((1, 2)), 1)).max(initial=0))


# -------------------------------------------------------------------------------------------------- COCO's form
def run_lengths(mask: Array) -> list[int]:
    """Lengths of the runs of False and True of bool [H, W] in turn, column by column, the first of False (maybe 0)."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [~mask.ravel(order="F")[-1]]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(ends, prepend=0).tolist()


def annotation(label: int, mask: Array) -> dict[str, Any]:
    """What COCO says of an object, without its numbers. The box is left, top, width, height."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return {
        "category_id": label + 1,
        "bbox": [int(value) for value in box],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
        "iscrowd": 0,
    }


def coco(size: int, objects: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """A whole file of COCO's: images by number, the objects of each, categories."""
    every = [(number, thing) for number, things in enumerate(objects) for thing in things]
    return {
        "info": {"description": "garments on photographs, made by data_prep.scenes"},
        "images": [
            {"id": number, "file_name": file_name(number), "width": size, "height": size}
            for number in range(len(objects))
        ],
        "annotations": [{"id": k, "image_id": number, **thing} for k, (number, thing) in enumerate(every, 1)],
        "categories": [{"id": k, "name": name, "supercategory": "garment"} for k, name in enumerate(CLASSES, 1)],
    }


# -------------------------------------------------------------------------------------------------- files
def file_name(number: int) -> str:
    return f"{number:08d}.png"


@dataclass(frozen=True)
class Task:
    """What one process needs to write images of a split."""

    material: Material
    key: Array
    size: int
    objects: tuple[int, int]
    folder: Path  # of the split

    def write(self, number: int) -> tuple[int, list[dict[str, Any]]]:
        """Write the three files of an image; its label and its objects."""
        scene = draw_scene(self.material, self.key, number, self.size, self.objects)
        for kind, pixels in zip(KINDS, (scene.pixels, scene.classes, (scene.classes > 0) * np.uint8(255)), strict=True):
            Image.fromarray(pixels).save(self.folder / kind / file_name(number))
        things = [annotation(label, mask) for label, mask in zip(scene.labels, scene.masks, strict=True)]
        return scene.label, things


_task: Task | None = None


def _enter_worker(task: Task) -> None:
    """Start of every process: one thread each."""
    global _task
    become_worker()
    import cv2

    cv2.setNumThreads(0)
    _task = task


def _write_chunk(numbers: Sequence[int]) -> list[tuple[int, list[dict[str, Any]]]]:
    assert _task is not None
    return [_task.write(number) for number in numbers]


def write_split(task: Task, split: str, count: int, num_workers: int) -> None:
    """Write the images of a split, its list and its COCO file.

    **Raises:** `UserError` if a process dies; `KeyboardInterrupt` if told to stop.
    """
    for kind in KINDS:
        (task.folder / kind).mkdir(parents=True)
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    workers = min(count_workers(num_workers), len(chunks))
    made: list[tuple[int, list[dict[str, Any]]]] = []
    pool = ProcessPoolExecutor(workers, fork, initializer=_enter_worker, initargs=(task,))
    with pool, progress_bar(count, f"draw {split}", "img") as bar, asked_to_stop() as stopping:
        try:
            for rows in in_order(pool, _write_chunk, chunks, workers * AHEAD):
                made += rows
                bar.update(len(rows))
                if stopping():
                    raise KeyboardInterrupt
        except BrokenProcessPool as error:
            raise UserError(
                f"a process died after {len(made)} of {count} images, most likely because memory ran out; run the "
                f"same command again with fewer --num_workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    lines = [f"{split}/images/{file_name(number)}\t{CLASSES[label]}\n" for number, (label, _) in enumerate(made)]
    write_text(task.folder.with_suffix(".txt"), "".join(lines))
    annotations = task.folder.parent / "annotations" / f"{split}.json"  # train.json is train.beton's, if it lies there
    annotations.parent.mkdir(exist_ok=True)
    write_text(annotations, json.dumps(coco(task.size, [things for _, things in made])) + "\n")


def gather(args: argparse.Namespace) -> dict[str, Material]:
    """What both splits are made of."""
    grounds = read_photographs(photographs(sources()))
    with tempfile.TemporaryDirectory() as download:
        source = find_source(args.garments, Path(download))
        return {split: Material(grounds[split], *read_garments(split, source)) for split in STREAMS}


def write_scenes(material: dict[str, Material], args: argparse.Namespace, out: Path) -> None:
    """Both splits, into the new folder `out`."""
    for split, count in (("train", args.number), ("val", args.val_number)):
        key = key_of(args.seed, STREAMS[split], Stream.PREPARATION)
        task = Task(material[split], key, args.size, tuple(args.objects), out / split)
        write_split(task, split, count, args.num_workers)
    write_text(out / "classes.txt", "".join(f"{name}\n" for name in CLASSES))


# -------------------------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m data_prep.scenes", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder to write")
    parser.add_argument("--number", type=int, default=20_000, metavar="N", help="images of train (default 20000)")
    parser.add_argument("--val_number", type=int, default=4_000, metavar="N", help="images of val (default 4000)")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="side of the images (default 64)")
    parser.add_argument(
        "--objects",
        type=int,
        nargs=2,
        default=[1, 1],
        metavar=("LOW", "HIGH"),
        help=f"fewest and most garments of an image, up to {MOST} (default 1 1)",
    )
    parser.add_argument(
        "--garments", type=Path, metavar="RAW_DIR", help="folder with Fashion-MNIST's idx files (default: Debian's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes; 0 = all cores (default)")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if not least <= value <= most:
            raise UserError(f"{name} is {value}, expected {least} to {most}")
    low, high = args.objects
    if not 1 <= low <= high <= MOST:
        raise UserError(f"objects are {low} to {high}, expected LOW and HIGH with 1 <= LOW <= HIGH <= {MOST}")
    if args.out.exists():
        raise UserError(f"{args.out} is there already; choose another OUT, or remove it")


def main(argv: Sequence[str] | None = None) -> None:
    """Make the set and say what was written."""
    args = build_parser().parse_args(argv)
    _check(args)
    check_opencv()
    started = time.monotonic()
    material = gather(args)
    with writing(args.out, "make room, or choose another OUT"), replacing(args.out) as aside:
        write_scenes(material, args, aside)
    print(
        f"wrote {args.out}: {args.number} images of train, {args.val_number} of val, {args.size} x {args.size} pixels, "
        f"{len(CLASSES)} classes, in {time.monotonic() - started:.0f} s\n"
        f"      next: python -m data_prep.images {args.out}/train.txt {args.out}/train.beton --write_mode raw "
        f"--classes {args.out}/classes.txt"
    )


if __name__ == "__main__":
    run_command(main)
