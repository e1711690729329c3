"""Sets in COCO's form: one JSON file of images, objects and categories, and a folder of images.

Everything that the file says is checked before the first step: what cannot be meant is one line, what real sets are
known to hold (boxes without an area, broken polygons) is left out, counted and said. Crowds are no objects to learn;
tests ignore detections of them, as COCO does. Classes are the categories in the order of their ids; label 1 is the
first, and 0 is the ground.

Objects are kept packed, an image's in one string of bytes: COCO's as Python objects would be copied into every worker.
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasthpm.data.pixels import luminance
from fasthpm.data.plain import read_pixels
from fasthpm.data.rasters.files import KIND_REMEDY, FileReader
from fasthpm.data.sampling import Array
from fasthpm.dense.detection import masks
from fasthpm.dense.loader import Unreadable
from fasthpm.errors import UserError, note_once

SEGM = "segmentation"
KEPT_OF_IMAGES = ("neg_category_ids", "not_exhaustive_category_ids")  # LVIS's, for its AP
LISTED = 3  # names that one line tells
LOOKED_AT = 16  # images whose headers are looked at before anything starts


class Thing(NamedTuple):
    """An object as the file has it."""

    label: int  # from 1
    crowd: bool
    box: tuple[float, float, float, float]  # left, top, width, height
    area: float | None
    segmentation: Any  # polygons, or run lengths


class Image(NamedTuple):
    """An image as the file has it."""

    file: str
    height: int
    width: int
    more: dict[str, Any]  # `KEPT_OF_IMAGES`


class Seen(NamedTuple):
    """What a sample is: an image and, to train on, its objects."""

    pixels: Array  # [H, W, C], of photographs uint8
    masks: Array  # uint8 [N, H, W]
    labels: Array  # int64 [N], from 1
    sample: int  # its number in the set


@dataclass(frozen=True)
class Annotations:
    """A file's contents: images, their objects, and the categories as the file has them, by id."""

    images: list[Image]
    things: list[list[Thing]]  # of each image
    categories: list[dict[str, Any]]


# -------------------------------------------------------------------------------------------------- where
def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """(file, folder of images) of "train" or "val" under `root`, in any of the layouts that are known.

    **Raises:** `UserError` that names what was looked for.
    """
    layouts = (
        (f"{split}.json", f"{split}/images"),  # data_prep.scenes
        (f"annotations/{split}.json", f"{split}/images"),
        (f"annotations/instances_{split}2017.json", f"{split}2017"),  # COCO
        (f"annotations/lvis_v1_{split}.json", ""),  # LVIS, on COCO's folders
        (f"lvis_v1_{split}.json", ""),
    )
    sidecar = root / f"{split}.json" if (root / f"{split}.beton").is_file() else None  # what data_prep.images writes
    for file, folder in layouts:
        if (root / file).is_file() and root / file != sidecar:
            return root / file, root / folder
    if sidecar:
        raise UserError(
            f"{sidecar} belongs to the prepared set beside it, which has taken the place of a file of objects; make "
            f"the set again, and prepare it under another name"
        )
    names = ", ".join(file for file, _ in layouts)
    there = "is no folder" if not root.is_dir() else f"holds none of {names}"
    raise UserError(f"data_path {root} {there}; give such a folder, or --{split}_json and --{split}_images")


# -------------------------------------------------------------------------------------------------- reading
def read_annotations(path: Path) -> Annotations:
    """Read and check a file.

    **Raises:** `UserError` for a file that is none, and for one that contradicts itself.
    """
    raw = _load(path)
    categories = _categories(raw["categories"], path)
    numbers, images = _images(raw["images"], path)
    labels = {category["id"]: label for label, category in enumerate(categories, 1)}
    things: list[list[Thing]] = [[] for _ in images]
    for each in raw["annotations"]:
        name = f"annotation {each.get('id', '?') if isinstance(each, dict) else each!r} of {path}"
        try:
            number, label = numbers.get(each["image_id"]), labels.get(each["category_id"])
            thing = Thing(label or 0, bool(each.get("iscrowd")), _box(each["bbox"]), each.get("area"), each.get(SEGM))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{name} has no {_lacking(error)}; expected COCO's form") from error
        if number is None:
            raise UserError(f"{name} is of image {each['image_id']!r}, which the file does not list; make it again")
        if label is None:
            raise UserError(f"{name} is of category {each['category_id']!r}, which the file does not list")
        things[number].append(thing)
    return Annotations(images, things, categories)


def _lacking(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) else "numbers where they belong"


def _box(values: Any) -> tuple[float, float, float, float]:
    left, top, width, height = (float(value) for value in values)
    return left, top, width, height


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); give a JSON file of COCO's form"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); give a file of COCO's form, or copy it again") from error
    keys = ("images", "annotations", "categories")
    lacking = [key for key in keys if not (isinstance(raw, dict) and isinstance(raw.get(key), list))]
    if lacking:
        raise UserError(f"{path} has no list of {' and of '.join(lacking)}; expected COCO's form")
    for key in ("images", "categories"):
        if not raw[key]:
            raise UserError(f"{path} holds no {key}; expected COCO's form")
    return raw


def _categories(raw: list[Any], path: Path) -> list[dict[str, Any]]:
    """By id. A name that two of them have is told apart by the id."""
    try:
        found = sorted(({**each, "name": str(each["name"])} for each in raw), key=lambda each: int(each["id"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a category without id or name; expected COCO's form") from error
    _refuse_twice(((each["id"], each["name"]) for each in found), "category", path)
    names = Counter(each["name"] for each in found)
    return [{**each, "name": f"{each['name']} ({each['id']})"} if names[each["name"]] > 1 else each for each in found]


def _images(raw: list[Any], path: Path) -> tuple[dict[Any, int], list[Image]]:
    """Numbers by id, and the images."""
    try:
        found = [_image(each) for each in raw]
        _refuse_twice(zip((each["id"] for each in raw), (each.file for each in found), strict=True), "image", path)
    except (KeyError, TypeError, ValueError) as error:
        lacking = str(error.args[0]) if isinstance(error, KeyError) else "usable size"
        raise UserError(f"{path} has an image without {lacking}; expected COCO's form") from error
    return {each["id"]: number for number, each in enumerate(raw)}, found


def _image(raw: dict[str, Any]) -> Image:
    file = (
        raw["file_name"] if "file_name" in raw or "coco_url" not in raw else "/".join(raw["coco_url"].split("/")[-2:])
    )
    height, width = int(raw["height"]), int(raw["width"])
    if height < 1 or width < 1:
        raise ValueError(height, width)
    return Image(str(file), height, width, {key: raw[key] for key in KEPT_OF_IMAGES if key in raw})


def _refuse_twice(named: Iterable[tuple[Any, str]], what: str, path: Path) -> None:
    known: dict[Any, str] = {}
    for number, name in named:
        if number in known:
            raise UserError(
                f"{path} gives the {what} id {number!r} twice ({known[number]}, {name}); every {what} needs its own"
            )
        known[number] = name


# -------------------------------------------------------------------------------------------------- the set
def open_set(json_path: Path, folder: Path, *, train: bool, keep_empty: bool = False) -> "CocoSet":
    """A checked set.

    - `train`: what cannot be learnt from is left out, and said: crowds, boxes without an area, broken masks, and,
      unless `keep_empty`, images without an object (as detectron2 does). Otherwise broken masks alone are left out:
      COCO's AP counts the rest

    **Raises:** `UserError` for a file that contradicts itself, files that are missing, and a set without an object.
    """
    found = read_annotations(json_path)
    _refuse_missing(found.images, folder, json_path)
    rows = list(range(len(found.images)))
    things, dropped = _usable(found, train)
    total = sum(map(len, found.things))
    if not any(not thing.crowd for row in things for thing in row):
        left = f" that can be used ({_told(dropped)})" if dropped else ""
        raise UserError(f"{json_path} holds no object{left}; give a set with objects")
    if dropped:
        where = "training" if train else "testing"
        note_once(f"{json_path}: {sum(dropped.values())} of {total} objects are left out of {where}: {_told(dropped)}")
    if train and not keep_empty:
        rows = [row for row in rows if things[row]]
        if len(rows) < len(found.images):
            empty = len(found.images) - len(rows)
            note_once(
                f"{json_path}: {empty} of {len(found.images)} images have no object to learn and are left out of "
                f"training (--keep_empty keeps them)"
            )
    kept = Annotations([found.images[row] for row in rows], [things[row] for row in rows], found.categories)
    return CocoSet(kept, str(json_path), folder, train)


def _told(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {why}" for why, count in dropped.most_common())


def _usable(found: Annotations, train: bool) -> tuple[list[list[Thing]], Counter[str]]:
    """What is used of every image's objects, and how many are not, by reason."""
    dropped: Counter[str] = Counter()
    things: list[list[Thing]] = []
    for image, row in zip(found.images, found.things, strict=True):
        kept = []
        for thing in row:
            why = _unusable(thing, image, train)
            dropped[why] += bool(why)
            if not why:
                kept.append(thing)
        things.append(kept)
    return things, +dropped


def _unusable(thing: Thing, image: Image, train: bool) -> str:
    """Why an object is left out, "" if it is not."""
    if train and thing.crowd:
        return "of a crowd"
    if broken := masks.problem_of(thing.segmentation, image.height, image.width):
        return f"with {broken}"
    left, top, width, height = thing.box
    if not math.isfinite(sum(thing.box)):
        return "with a box that is not finite"
    seen = min(left + width, image.width) > max(left, 0) and min(top + height, image.height) > max(top, 0)
    return "" if seen or not train else "with a box of no area inside the image"


def _refuse_missing(images: Sequence[Image], folder: Path, json_path: Path) -> None:
    """One listing per folder instead of a question per file."""
    by_folder: defaultdict[str, list[str]] = defaultdict(list)
    for image in images:
        parent, name = os.path.split(image.file)
        by_folder[parent].append(name)
    missing: list[str] = []
    for parent, names in by_folder.items():
        place = folder / parent
        there = set(os.listdir(place)) if place.is_dir() else set()
        missing += [os.path.join(parent, name) for name in names if name not in there]
    if missing:
        some = ", ".join(sorted(missing)[:LISTED]) + (", …" if len(missing) > LISTED else "")
        raise UserError(
            f"{json_path} names {len(missing)} of {len(images)} files that {folder} does not hold ({some}); give the "
            f"folder that they are in, or copy the set again"
        )


class Packed(Sequence[Any]):
    """A list of what JSON can say, as bytes that worker processes share. Tuples come back as lists, bytes as text."""

    def __init__(self, values: Iterable[Any]) -> None:
        parts = [np.frombuffer(json.dumps(value, default=bytes.decode).encode(), np.uint8) for value in values]
        self._ends = np.cumsum([0, *map(len, parts)])
        self._bytes = np.concatenate(parts) if parts else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: Any) -> Any:
        return json.loads(self._bytes[self._ends[number] : self._ends[number + 1]].tobytes())


class CocoSet:
    """A `DenseSet` of images and objects; see `open_set`."""

    def __init__(self, found: Annotations, source: str, folder: Path, train: bool) -> None:
        self.source, self.folder, self.train = source, folder, train
        self.categories = found.categories
        self.classes = tuple(category["name"] for category in found.categories)
        self._images, self._things = Packed(found.images), Packed(found.things)
        self.channels = 3  # that images are read with; 1: their luminance
        self.reader: FileReader | None = None  # of images that are no photographs
        self.repeated: Array | None = None  # float [N], see `lvis.repeat_factors`

    def __len__(self) -> int:
        return len(self._images)

    def name(self, sample: int) -> str:
        """The image's file."""
        return str(self.folder / self.image(sample).file)

    def image(self, sample: int) -> Image:
        """What the file says of an image."""
        return Image(*self._images[sample])

    def things(self, sample: int) -> list[Thing]:
        """What the file says of its objects."""
        return [Thing(label, crowd, tuple(box), *rest) for label, crowd, box, *rest in self._things[sample]]

    def repeats(self) -> Array | None:
        """How often each image comes in an epoch, float [N]; None: once."""
        return self.repeated

    def read(self, sample: int) -> Seen:
        """The image and, in training, its objects.

        **Raises:** `Unreadable` for an image that does not decode or has another size than the file says.
        """
        image = self.image(sample)
        pixels = self.pixels(sample)
        if pixels.shape[:2] != (image.height, image.width):
            theirs, ours = (f"{width}x{height}" for height, width in (image[1:3], pixels.shape[:2]))
            raise Unreadable(f"has {ours} pixels, {self.source} says {theirs}")
        things = self.things(sample) if self.train else []
        try:
            made = masks.decode([thing.segmentation for thing in things], image.height, image.width)
        except ValueError as error:
            raise Unreadable(f"has an object of {self.source} that cannot be read ({error})") from error
        return Seen(pixels, made, np.array([thing.label for thing in things], np.int64), sample)

    def pixels(self, sample: int) -> Array:
        """An image [H, W, C]. **Raises:** `Unreadable` for one that does not decode, or is not of the model's kind."""
        if self.reader is None:
            try:
                pixels = read_pixels(self.name(sample))
            except UserError as error:
                raise Unreadable(f"cannot be read as an image ({error.__cause__})") from error
            return luminance(pixels) if self.channels == 1 else pixels
        try:
            return self.reader(Path(self.name(sample)))
        except (UserError, MemoryError):
            raise
        except Exception as error:  # readers raise nearly anything for damaged files
            raise Unreadable(f"cannot be read as an image ({error})") from error

    def check_kind(self) -> None:
        """Look at the headers of some images. **Raises:** `UserError` for one of another kind than the model takes."""
        if self.reader is None:
            return
        for sample in np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(int)).tolist():
            path = Path(self.name(sample))
            try:
                unlike = self.reader.look(path)[1]
            except UserError:
                raise
            except Exception:  # damaged: a bad sample when it comes
                continue
            if unlike:
                raise UserError(f"image {path} has {unlike}; {KIND_REMEDY}")

    def truth(self, samples: Iterable[int]) -> dict[str, Any]:
        """What an AP is computed against, in COCO's form: image n is sample n, category k the label k."""
        images, things = [], []
        for sample in samples:
            image = self.image(sample)
            images.append({"id": sample, "height": image.height, "width": image.width, **self._more(image)})
            things += [self._annotation(sample, thing, image) for thing in self.things(sample)]
        return {
            "images": images,
            "annotations": [{"id": number, **thing} for number, thing in enumerate(things, 1)],
            "categories": [
                {"id": label, "name": each["name"], **{key: each[key] for key in ("frequency",) if key in each}}
                for label, each in enumerate(self.categories, 1)
            ],
        }

    def _more(self, image: Image) -> dict[str, Any]:
        labels = {category["id"]: label for label, category in enumerate(self.categories, 1)}
        return {key: [labels[number] for number in numbers if number in labels] for key, numbers in image.more.items()}

    def _annotation(self, sample: int, thing: Thing, image: Image) -> dict[str, Any]:
        area = thing.area
        if area is None:
            area = float(masks.decode([thing.segmentation], image.height, image.width).sum())
        return {
            "image_id": sample,
            "category_id": thing.label,
            "iscrowd": int(thing.crowd),
            "bbox": list(thing.box),
            "area": area,
            "segmentation": thing.segmentation,
        }
