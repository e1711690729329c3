"""Sets of image and mask files: every image has a mask of the same name, whose pixels are classes.

Three layouts:

    DATA_PATH/{train,val}/{images,masks}/ and DATA_PATH/classes.txt      what data_prep.scenes writes
    ADEChallengeData2016/{images,annotations}/{training,validation}/     ADE20K as it is, with its objectInfo150.txt
    --train_images A --train_masks B --val_images C --val_masks D --classes FILE --background …     any folders

Names agree but for their ending (a.jpg, a.png), in folders within as well. Masks have one channel: grey with 1 to 16
bits, or a palette, whose index is the value. Images are read by `data.decoding`, as everywhere; those of a model that
was trained on other numbers than photographs have by `data.rasters.files`, which keeps them.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fasthpm.data import decoding, png, tiff
from fasthpm.data.listing import files_below
from fasthpm.data.pixels import IMAGES, luminance
from fasthpm.data.quiet import quietly
from fasthpm.data.rasters.files import KIND_REMEDY, FileReader, is_image, reader_of, stem_of
from fasthpm.data.sampling import Array
from fasthpm.data.values import Values
from fasthpm.dense.loader import Unreadable
from fasthpm.errors import UserError
from fasthpm.options import option

IGNORED = 255  # among labels: counts neither in losses nor in figures
MOST_CLASSES = IGNORED  # labels are 0 .. 254
LARGEST_VALUE = 65535  # of a mask's pixels
CLASSES, ADE_CLASSES = "classes.txt", "objectInfo150.txt"
ADE = "ADEChallengeData2016"
ADE_SPLITS = {"train": "training", "val": "validation"}
BACKGROUND = "background"  # the class that value 0 is with --background class
LOOKED_AT = 16  # masks whose values are looked at before anything starts
HEADERS = 16  # files whose headers are read at a time
LOSSY = ("JPEG", "MPO", "JPEG2000")
ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
DEPTH, GREY = 24, 0  # where a PNG says how many bits a channel has, before the kind of its colours
PACKED = {2: 85, 4: 17}  # bits of a grey PNG: what Pillow multiplies its values by, so that white is 255


@dataclass(frozen=True)
class PairFiles:
    """Where images and masks are and what a mask's values mean: the options of every command that reads them."""

    data_path: str = option("", f"folder with {{train,val}}/{{images,masks}}/ and {CLASSES}, or ADE20K's {ADE}")
    train_images: str = option("", "instead of data_path: folder of images to train on")
    train_masks: str = option("", "folder of their masks, of the same names but for the ending")
    val_images: str = option("", "folder of images to test on", run_only=True)
    val_masks: str = option("", "folder of their masks", run_only=True)
    classes: str = option("", f"file with the classes, one a line; empty = DATA_PATH/{CLASSES}")
    ignore_index: int = option(IGNORED, "mask value that counts nowhere", low=0, high=LARGEST_VALUE)
    background: str = option(
        "",
        "what value 0 of a mask is: class, a class of its own, the file naming those from 1 on; ignore, nothing that "
        "counts, the same file; first, the file's first class. empty = class, of ADE20K ignore",
        choices=("", "class", "ignore", "first"),
    )


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class PairSet:
    """Images and masks of a split, a `DenseSet`."""

    source: str
    classes: tuple[str, ...]
    pairs: tuple[Pair, ...]
    table: Array  # int16 [65536]: a mask's value -> label, 255 = ignored, -1 = no class
    channels: int = 3  # of the images: 3, or 1 for a model of grey images, or those that `reader` gives
    words: str = ""  # what mask values were taken for
    reader: FileReader | None = None  # of images that are no photographs

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, sample: int) -> str:
        """The image file."""
        return str(self.pairs[sample].image)

    def repeats(self) -> Array | None:
        """Every sample once an epoch."""
        return None

    def read(self, sample: int) -> tuple[Array, Array]:
        """Image [H, W, C], of photographs uint8, and labels uint8 [H, W] in 0..K-1, or 255 = ignored.

        A sample that is wholly ignored is read as any other: crops of half-ignored ones are as empty, so that losses
        and figures have to take them anyway, and sets with many images that nobody annotated do not stop a run.

        **Raises:** `Unreadable` for a damaged file, another size of the mask and values that are no class.
        """
        pair, reader = self.pairs[sample], self.reader
        read = (lambda path: decoding.read(path.read_bytes()).pixels) if reader is None else reader
        pixels = _reading(pair.image, read)
        labels = self.labels(sample)
        if pixels.shape[:2] != labels.shape:
            sizes = " and ".join(f"{width} x {height}" for height, width in (pixels.shape[:2], labels.shape))
            raise Unreadable(f"and its mask {pair.mask} have different sizes, {sizes} pixels")
        return (luminance(pixels) if reader is None and self.channels == 1 else pixels), labels

    def labels(self, sample: int) -> Array:
        """The labels alone, uint8 [H, W]. **Raises:** `Unreadable`."""
        path = self.pairs[sample].mask
        values = _reading(path, lambda path: read_mask(path.read_bytes()))
        inside = (values >= 0) & (values <= LARGEST_VALUE)
        labels = self.table[np.where(inside, values, 0)]
        wrong = values[~inside | (labels < 0)]
        if len(wrong):
            raise NoClass(f"has a mask, {path}, with the value {int(wrong[0])}, expected {self.words}")
        return labels.astype(np.uint8)


class NoClass(Unreadable):
    """A mask has a value that is no class."""


# -------------------------------------------------------------------------------------------------- opening
def open_pairs(
    options: PairFiles, split: str, *, channels: int = 3, limit: int = 0, values: Values | None = None
) -> PairSet:
    """The images and masks of "train" or "val". All that can be told from names, headers and some masks is checked.

    - `channels`: of the images that `read` gives, 3 or 1 of photographs
    - `values`: what the pixels are that the model was trained on; None: photographs
    - `limit`: only so many, evenly spread over the set; 0 = all

    **Raises:** `UserError` for folders that are empty or not there, images without masks and masks without images,
    other sizes, masks in colour or with lost detail, classes that make no sense, and values that are none of them.
    """
    images, masks, classes_file, background = _layout(options, split)
    names = read_classes(classes_file)
    classes, table, words = _meaning(names, background, options.ignore_index, classes_file)
    reader = reader_of(values or Values(), channels)
    pairs = match(images, masks, IMAGES.holds if reader is None else is_image)
    if limit and limit < len(pairs):
        pairs = tuple(pairs[k] for k in np.unique(np.linspace(0, len(pairs) - 1, limit).astype(int)))
    check_headers(pairs, reader)
    source = options.data_path or str(images)
    found = PairSet(source, classes, pairs, table, channels, words, reader)
    _check_values(found)
    return found


def _layout(options: PairFiles, split: str) -> tuple[Path, Path, Path, str]:
    """Folder of images, folder of masks, file of classes, and what value 0 is."""
    flags = (f"{split}_images", f"{split}_masks")
    given = [name for name in ("train_images", "train_masks", "val_images", "val_masks") if getattr(options, name)]
    if options.data_path and given:
        raise UserError(f"both --data_path and --{given[0]} are given; leave one out")
    if given:
        return _own_folders(options, flags)
    if not options.data_path:
        raise UserError(
            "--data_path is missing: a folder with {train,val}/{images,masks}/ and classes.txt, or ADE20K's; or give "
            "--train_images, --train_masks, --val_images, --val_masks and --classes"
        )
    root = Path(options.data_path)
    for folder in (root, root / ADE):
        images, masks = (folder / kind / ADE_SPLITS[split] for kind in ("images", "annotations"))
        if masks.is_dir():
            return images, masks, Path(options.classes or folder / ADE_CLASSES), options.background or "ignore"
    images, masks = root / split / "images", root / split / "masks"
    if not masks.is_dir():
        raise UserError(
            f"{root} has no {split}/masks and is no {ADE}; expected {split}/images, {split}/masks and {CLASSES} in it, "
            f"or name your folders with --{flags[0]} and --{flags[1]}"
        )
    return images, masks, Path(options.classes or root / CLASSES), options.background or "class"


def _own_folders(options: PairFiles, flags: tuple[str, str]) -> tuple[Path, Path, Path, str]:
    for name in (*flags, "classes"):
        if not getattr(options, name):
            raise UserError(f"--{name} is missing: images and masks in folders of your own need {_all(flags)}")
    if not options.background:
        raise UserError(
            "--background is missing: say what value 0 of your masks is: class (a class of its own), ignore (nothing "
            "that counts) or first (the first class of --classes)"
        )
    images, masks = (Path(getattr(options, name)) for name in flags)
    return images, masks, Path(options.classes), options.background


def _all(flags: Iterable[str]) -> str:
    return ", ".join(f"--{name}" for name in (*flags, "classes", "background"))


def match(images: Path, masks: Path, holds: Callable[[str], bool] = IMAGES.holds) -> tuple[Pair, ...]:
    """Images and masks of the same names, sorted. **Raises:** `UserError` if one has no other, or several.

    - `holds`: which files are images
    """
    found, other = _by_stem(images, holds), _by_stem(masks, IMAGES.holds)
    for these, those, what, missing, where in (
        (found, other, "image", "mask", masks),
        (other, found, "mask", "image", images),
    ):
        alone = [path for stem, path in these.items() if stem not in those]
        if alone:
            raise UserError(
                f"{what} {alone[0]} has no {missing} of the same name in {where} ({len(alone)} of {len(these)} have "
                f"none); names must agree but for the ending, like a.jpg and a.png"
            )
    return tuple(Pair(path, other[stem]) for stem, path in found.items())


def _by_stem(folder: Path, holds: Callable[[str], bool]) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"folder {folder} is not there; check the path")
    files = [path for path in files_below(folder) if holds(str(path))]
    if not files:
        raise UserError(f"{folder} holds no images; expected files such as .png and .jpg")
    found: dict[str, Path] = {}
    for path in files:
        stem = stem_of(str(path.relative_to(folder)))
        if stem in found:
            raise UserError(f"{found[stem]} and {path} have one name but for the ending; remove one")
        found[stem] = path
    return found


# -------------------------------------------------------------------------------------------------- classes
def read_classes(path: Path) -> tuple[str, ...]:
    """Names, one a line, or the column Name of ADE20K's objectInfo150.txt.

    **Raises:** `UserError` for a file that cannot be read, empty lines, names that come twice, and too many or none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"classes {path} cannot be read ({reason}); expected UTF-8 text, a name a line") from error
    while lines and not lines[-1].strip():
        lines.pop()
    first = 1
    if lines and "\t" in lines[0] and "Name" in (columns := lines[0].split("\t")):
        place, first = columns.index("Name"), 2
        lines = [(line.split("\t")[place : place + 1] or [""])[0] for line in lines[1:]]
    names = tuple(line.strip() for line in lines)
    seen: dict[str, int] = {}
    for number, name in enumerate(names, first):
        if not name:
            raise UserError(f"{path} line {number} is empty, expected the name of a class; remove it")
        if name in seen:
            raise UserError(f"{path} line {number} is {name!r} again, as line {seen[name]}; give every class its own")
        seen[name] = number
    if not names:
        raise UserError(f"{path} is empty, expected the name of a class in every line")
    return names


def _meaning(names: tuple[str, ...], background: str, ignored: int, path: Path) -> tuple[tuple[str, ...], Array, str]:
    """The classes, the table from values to labels, and the same in words."""
    if background == "class" and names[0].lower() != BACKGROUND:
        names = (BACKGROUND, *names)
    start = 1 if background == "ignore" else 0
    if len(names) > MOST_CLASSES:
        raise UserError(f"{path} has {len(names)} classes, expected {MOST_CLASSES} or fewer")
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} class, expected 2 or more; with --background class 0 is another one")
    if ignored == 0 and background != "ignore":
        raise UserError(f"--ignore_index 0 contradicts --background {background}; use --background ignore")
    table = np.full(LARGEST_VALUE + 1, -1, np.int16)
    table[start : start + len(names)] = np.arange(len(names))
    unused = {ignored, 0} if background == "ignore" else {ignored}
    table[[*unused]] = IGNORED
    last = start + len(names) - 1
    nothing = " and ".join(str(value) for value in sorted(unused))
    return names, table, f"{start} ({names[0]}) to {last} ({names[-1]}), and {nothing} (ignored)"


# -------------------------------------------------------------------------------------------------- checks
def check_headers(pairs: Iterable[Pair], reader: FileReader | None = None) -> None:
    """Sizes and kinds, by headers alone; a file whose header cannot be read is a bad sample later on.

    - `reader`: of images that are no photographs

    **Raises:** `UserError` naming the first pair of different sizes, the first mask or image of a wrong kind; and if
    the library that reads the images is not installed.
    """
    pairs = tuple(pairs)
    with ThreadPoolExecutor(HEADERS) as pool:
        problems = list(pool.map(partial(_problem, reader=reader), pairs))
    for kind, remedy in REMEDIES.items():
        found = [problem for problem in problems if problem and problem[0] == kind]
        if found:
            raise UserError(f"{found[0][1]} ({len(found)} of {len(pairs)} are like that); {remedy}")


REMEDIES = {
    "kind": "save masks as PNG with one channel, in which every value is a class",
    "values": KIND_REMEDY,
    "size": "a mask says the class of every pixel of its image (an image may be turned by its EXIF data: save it anew)",
}


def _problem(pair: Pair, reader: FileReader | None = None) -> tuple[str, str] | None:
    try:
        with quietly(), Image.open(pair.mask) as mask:
            wrong, sides = _wrong_kind(mask), mask.size[::-1]
            if wrong:
                return "kind", f"mask {pair.mask} is {wrong}"
            theirs, unlike = (decoding.size_of(str(pair.image)), "") if reader is None else reader.look(pair.image)
    except UserError:
        raise
    except Exception:  # damaged: that is for whoever reads it
        return None
    if unlike:
        return "values", f"image {pair.image} has {unlike}"
    if sides == theirs:
        return None
    return "size", f"image {pair.image} has {theirs[1]} x {theirs[0]} pixels, its mask {sides[1]} x {sides[0]}"


def _wrong_kind(mask: Image.Image) -> str:
    """What makes an opened file useless as a mask; empty for a good one."""
    if mask.format in LOSSY:
        return f"a {mask.format}, which changes values"
    if mask.mode not in ONE_CHANNEL:
        count = len(mask.getbands())
        return f"of {count} channels ({mask.mode})" if count > 1 else f"of mode {mask.mode}, no whole numbers"
    return ""


def _check_values(pairs: PairSet) -> None:
    """Look at some masks. **Raises:** `UserError` if one has a value that is no class, or all are ignored."""
    looked, labelled = 0, False
    for sample in np.unique(np.linspace(0, len(pairs) - 1, LOOKED_AT).astype(int)).tolist():
        try:
            labelled |= bool((pairs.labels(sample) != IGNORED).any())
            looked += 1
        except NoClass as error:
            remedy = "check --classes, --background and --ignore_index"
            raise UserError(f"{pairs.name(sample)} {error}; {remedy}") from error
        except Unreadable:  # damaged: replaced, counted and listed when it comes
            continue
    if looked and not labelled:
        raise UserError(
            f"{looked} masks of {pairs.source} were looked at, and all of their values are ignored, as in "
            f"{pairs.pairs[0].mask}; expected {pairs.words}: check --background and --ignore_index"
        )


# -------------------------------------------------------------------------------------------------- reading
def _reading(path: Path, read: Callable[[Path], Any]) -> Array:
    """**Raises:** `Unreadable` with whatever a decoder has to say of a file."""
    try:
        with quietly():
            return read(path)
    except (Unreadable, UserError):
        raise
    except OSError as error:
        raise Unreadable(f"needs {path}, which cannot be read ({error.strerror or error})") from error
    except Exception as error:  # damaged files raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(f"needs {path}, which is damaged or no image ({reason})") from error


def read_mask(data: bytes) -> Array:
    """The values of a mask file, whole numbers [H, W]; of a palette the index.

    **Raises:** `ValueError`, or what Pillow raises, for a file that is damaged or no mask.
    """
    image = decoding.open_picture(data).image
    if wrong := _wrong_kind(image):
        raise ValueError(f"a mask {wrong}, expected one channel")
    if image.format == "PNG":
        png.check_png(data)
    if image.format == "TIFF":
        with tiff.strictly():
            image.load()
        tiff.check_tiff(data, image)
    values = np.asarray(image)
    if values.dtype == bool:
        return values.astype(np.uint8)
    depth, colour = data[DEPTH : DEPTH + 2] if image.format == "PNG" else (8, GREY)
    return values // np.uint8(PACKED[depth]) if colour == GREY and depth in PACKED else values
