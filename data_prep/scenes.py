"""Garments or cliparts on photographs: a seeded test set with exact truth, made without a network.

    python -m data_prep.scenes OUT --number 20000 --val_number 4000 --size 64 --seed 0
    fasthpm dense RUN --data_path OUT
    python -m data_prep.images OUT/train.txt OUT/train_set.beton --write_mode raw --classes OUT/classes.txt

This is no benchmark: nobody has published figures on it. It is small, its labels, boxes and masks are exact because it
is drawn, and any machine with Debian's packages can make it again. Fashion-MNIST's garments, in grey or tinted, are
pasted with soft edges on random crops of real photographs (`data_prep.photographs`). train and val have different
photographs and different garments, those of Fashion-MNIST's own splits. With --source clipart, pictures of the package
openclipart-png take the garments' place: 7 classes that are harder to tell apart, in their own colours.

OUT/{train,val}/images/NAME.png    RGB
OUT/{train,val}/masks/NAME.png     class of every pixel: 0 ground, then the classes in the order of classes.txt
OUT/{train,val}/objects/NAME.png   255 where a thing is, what `fasthpm maps --masks` reads
OUT/{train,val}.json               COCO's form: boxes, areas, run-length masks, class of every thing, from 1
OUT/{train,val}.txt                path and class of the largest thing, what `data_prep.images` reads
OUT/classes.txt                    the classes by name, 1 first

A pixel is a thing's if more than half of it is; where things overlap, the upper one's. Every image is a function of
source, seed, split and number alone (and of the files). OUT appears when all is there.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.coco_form import annotation, coco, file_name
from data_prep.encode import check_opencv
from data_prep.fashion_mnist import CLASSES, check_source, find_source
from data_prep.grounds import BOX, TRIES, draw_ground, read_photographs
from data_prep.pasting import SOFT_EDGE, paste
from data_prep.photographs import photographs, sources
from data_prep.pool import AHEAD, asked_to_stop, become_worker, fork, in_order
from data_prep.sets import progress_bar
from data_prep.things import CLIPARTS, LOOKS, OPENCLIPART, Things, check_cliparts, read_cliparts, read_garments
from fasthpm.cli import Parser, run_command, without_effect
from fasthpm.data.keys import Stream
from fasthpm.data.options import count_workers
from fasthpm.data.sampling import Array, key_of, uniforms
from fasthpm.errors import UserError
from fasthpm.files import check_above, replacing, write_text, writing

MOST, PLACES = 10, 8  # things of an image; places tried for one, of which the one that hides least is taken
DRAWN = 1 + LOOKS + 2 * PLACES  # numbers drawn per thing: its class, how it looks, and places
MOST_IMAGES = 10**8 - 1  # what the names have digits for
RANGES = {"size": (32, 2048), "seed": (0, 2**63 - 1), "num_workers": (0, 1024)}
CHUNK = 64  # images handed to a process at a time
KINDS = ("images", "masks", "objects")


@dataclass(frozen=True)
class Material:
    """What the scenes of a split are made of."""

    photographs: Sequence[Image.Image]
    things: Things
    classes: int  # how many the things are of


@dataclass(frozen=True)
class Scene:
    """An image and the truth about it."""

    pixels: Array  # uint8 [S, S, 3]
    labels: tuple[int, ...]  # class of every thing that is seen, from 0
    masks: Array  # bool [things, S, S], disjoint

    @property
    def label(self) -> int:
        """The class of the thing with most pixels, of several the first."""
        return self.labels[int(self.masks.sum((1, 2)).argmax())]

    @property
    def classes(self) -> Array:
        """0 or the class of every pixel, from 1: uint8 [S, S]."""
        return (self.masks * (1 + np.array(self.labels, np.uint8))[:, None, None]).sum(0).astype(np.uint8)


# -------------------------------------------------------------------------------------------------- one scene
def draw_scene(material: Material, key: Array, number: int, size: int, objects: tuple[int, int]) -> Scene:
    """Image `number` of a split: a ground, and things one over the other, from the numbers that `key` gives.

    The first thing's class is the remainder of `number`, so that every class has its share.
    """
    draws = uniforms(key, np.array([number]), 1 + TRIES * BOX + MOST * DRAWN)[0]
    low, high = objects
    count = low + int(draws[0] * (high - low + 1))
    canvas = draw_ground(material.photographs, draws[1 : 1 + TRIES * BOX].reshape(TRIES, BOX), size)
    labels: list[int] = []
    masks = np.zeros((0, size, size), bool)
    for row, draw in enumerate(draws[1 + TRIES * BOX :].reshape(MOST, DRAWN)[:count]):
        label = int(draw[0] * material.classes) if row else number % material.classes
        mask = draw_thing(material.things, label, canvas, masks, draw[1:])
        masks = np.concatenate([masks & ~mask, mask[None]])
        labels.append(label)
    seen = np.flatnonzero(masks.any((1, 2)))
    return Scene(canvas, tuple(labels[row] for row in seen), masks[seen])


def draw_thing(things: Things, label: int, canvas: Array, masks: Array, draws: Array) -> Array:
    """Paste a thing on uint8 `canvas` [S, S, 3] where it hides the others least; returns its mask, bool [S, S].

    - `masks`: bool [things, S, S], of those there
    - `draws`: [DRAWN - 1] in 0..1
    """
    size = len(canvas)
    colours, opacity, tint = things.look(label, size, draws[:LOOKS])
    room = size - np.array(opacity.shape) + 1
    places = (draws[LOOKS:].reshape(PLACES, 2) * room).astype(int).tolist()
    hidden = [_hidden(masks, opacity, place) for place in places]
    return paste(canvas, colours, opacity, tuple(places[int(np.argmin(hidden))]), tint)


def _hidden(masks: Array, opacity: Array, place: Sequence[int]) -> float:
    """The largest share of a thing there that one at `place` would hide."""
    (top, left), (height, width) = place, opacity.shape
    window = masks[:, top : top + height, left : left + width]
    covered = (window & (opacity > SOFT_EDGE)).sum((1, 2))
    return float((covered / np.maximum(masks.sum((1, 2)), 1)).max(initial=0))


# -------------------------------------------------------------------------------------------------- files
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


def write_images(task: Task, split: str, count: int, num_workers: int) -> list[tuple[int, list[dict[str, Any]]]]:
    """Write the images of a split; label and objects of each.

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
    return made


def write_split(task: Task, split: str, count: int, num_workers: int, source: "Source") -> None:
    """Write the images of a split, its list and its COCO file."""
    made = write_images(task, split, count, num_workers)
    lines = [f"{split}/images/{file_name(number)}\t{source.classes[label]}\n" for number, (label, _) in enumerate(made)]
    write_text(task.folder.with_suffix(".txt"), "".join(lines))
    told = coco(task.size, [things for _, things in made], source.classes, source.kind)
    write_text(task.folder.with_suffix(".json"), json.dumps(told) + "\n")


# -------------------------------------------------------------------------------------------------- sources
@dataclass(frozen=True)
class Source:
    """Where things come from."""

    kind: str  # "garment"
    classes: tuple[str, ...]
    read: Callable[[argparse.Namespace], dict[str, Things]]  # of each split
    streams: dict[str, int]  # in the place of an epoch in the keys of what is drawn; moving garments have 1 and 2


def _garments(args: argparse.Namespace) -> dict[str, Things]:
    with tempfile.TemporaryDirectory() as download:
        source = find_source(args.garments, Path(download))
        return {split: read_garments(split, source) for split in ("train", "val")}


def _cliparts(args: argparse.Namespace) -> dict[str, Things]:
    return {**read_cliparts(args.cliparts, args.size)}


SOURCES = {
    "garments": Source("garment", CLASSES, _garments, {"train": 3, "val": 4}),
    "clipart": Source("clipart", CLIPARTS, _cliparts, {"train": 5, "val": 6}),
}


def gather(args: argparse.Namespace) -> dict[str, Material]:
    """What both splits are made of."""
    grounds = read_photographs(photographs(sources()), args.size)
    source = SOURCES[args.source]
    things = source.read(args)
    return {split: Material(grounds[split], things[split], len(source.classes)) for split in source.streams}


def write_scenes(material: dict[str, Material], args: argparse.Namespace, out: Path) -> None:
    """Both splits, into the new folder `out`."""
    source = SOURCES[args.source]
    for split, count in (("train", args.number), ("val", args.val_number)):
        key = key_of(args.seed, source.streams[split], Stream.PREPARATION)
        task = Task(material[split], key, args.size, tuple(args.objects), out / split)
        write_split(task, split, count, args.num_workers, source)
    write_text(out / "classes.txt", "".join(f"{name}\n" for name in source.classes))


# -------------------------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m data_prep.scenes", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder to write")
    parser.add_argument(
        "--source", choices=tuple(SOURCES), default="garments", help="what is pasted (default garments)"
    )
    parser.add_argument("--number", type=int, default=20_000, metavar="N", help="images of train (default 20000)")
    parser.add_argument("--val_number", type=int, default=4_000, metavar="N", help="images of val (default 4000)")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="side of the images (default 64)")
    parser.add_argument(
        "--objects",
        type=int,
        nargs=2,
        default=[1, 1],
        metavar=("LOW", "HIGH"),
        help=f"fewest and most things of an image, up to {MOST} (default 1 1)",
    )
    parser.add_argument(
        "--garments", type=Path, metavar="RAW_DIR", help="folder with Fashion-MNIST's idx files (default: Debian's)"
    )
    parser.add_argument(
        "--cliparts",
        type=Path,
        default=OPENCLIPART,
        metavar="DIR",
        help=f"folder with folders of PNG files: {', '.join(CLIPARTS)} (default: Debian's)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes; 0 = all cores (default)")
    return parser


def _check(args: argparse.Namespace) -> None:
    images = (len(SOURCES[args.source].classes), MOST_IMAGES)  # one of each class
    for name, (least, most) in {"number": images, "val_number": images, **RANGES}.items():
        value = getattr(args, name)
        if not least <= value <= most:
            raise UserError(f"{name} is {value}, expected {least} to {most}")
    low, high = args.objects
    if not 1 <= low <= high <= MOST:
        raise UserError(f"objects are {low} to {high}, expected LOW and HIGH with 1 <= LOW <= HIGH <= {MOST}")
    if args.out.exists():
        raise UserError(f"{args.out} is there already; choose another OUT, or remove it")
    check_above(args.out, "OUT")
    if args.source == "garments":
        without_effect(["cliparts"], "--source garments pastes Fashion-MNIST's")
        check_source(args.garments)
    else:
        without_effect(["garments"], "--source clipart pastes cliparts")
        check_cliparts(args.cliparts)


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
        f"{len(SOURCES[args.source].classes)} classes, in {time.monotonic() - started:.0f} s\n"
        f"      next: python -m data_prep.images {args.out}/train.txt {args.out}/train_set.beton --write_mode raw "
        f"--classes {args.out}/classes.txt"
    )


if __name__ == "__main__":
    run_command(main)
