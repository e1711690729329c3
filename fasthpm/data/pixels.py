"""Image files on disk: finding them, and turning any kind of them into 8-bit RGB."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fasthpm.data.sampling import Array, crop_resize
from fasthpm.errors import UserError

EXTENSIONS = frozenset(
    [".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)
MAX_LABEL = 1_000_000


@dataclass(frozen=True)
class ImageList:
    """Files and what they show: `labels[i]` indexes `classes`."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------- one image
def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as upright 8-bit RGB.

    EXIF rotation is applied; transparency (alpha, or a palette or colour marked transparent) is laid over white;
    16-bit grey is scaled by 1/257, not clipped; CMYK is converted without its colour profile; of an animation the
    first frame is taken.

    **Raises:** `ValueError` for pixels whose range is unknown (32-bit integers above 65535, floats outside 0..1), and
    what PIL raises for damaged files.
    """
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image).convert("RGB")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # the only call that finds truncated files; its errors must reach the caller
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be parsed says nothing about the pixels
        return image


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or float, as 8-bit grey."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        limit = 1.0
    else:
        limit = 65535.0
    if not (values.min() >= 0 and values.max() <= limit):
        raise ValueError(f"{image.mode} pixels span {values.min():g} to {values.max():g}, expected 0 to {limit:g}")
    return Image.fromarray(np.rint(values * (255 / limit)).astype(np.uint8))


def is_grey(pixels: Array) -> bool:
    """Whether uint8 [h, w, 3] has three equal channels."""
    return bool((pixels[..., :1] == pixels[..., 1:]).all())


def luminance(pixels: Array) -> Array:
    """PIL's luma of uint8 [..., 3]: uint8 [..., 1]; of equal channels exactly their value."""
    red, green, blue = (pixels[..., c].astype(np.uint32) for c in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[..., None]


# ------------------------------------------------------------------------------------------------------- one crop
def render(image: Array, crop: Array, size: tuple[int, int], interpolation: str, factors: Array) -> Array:
    """Cut `crop` out of uint8 [h, w, C], resize it to `size`, flip it and change its colours: uint8 [H, W, C].

    `interpolation`: "area" (`area_resize`) or "bicubic" (PIL's, which averages where it shrinks). No pixel outside the
    crop takes part. `factors`: see `jitter_colours`.
    """
    if interpolation == "area":
        return jitter_colours(crop_resize(image, crop, size), factors)
    top, left, height, width, flipped = (int(value) for value in crop)
    part = image[top : top + height, left : left + width]
    picture = Image.fromarray(np.ascontiguousarray(part[..., 0] if part.shape[2] == 1 else part))
    out = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)).reshape(*size, part.shape[2])
    return jitter_colours(out[:, ::-1] if flipped else out, factors)


def jitter_colours(image: Array, factors: Array) -> Array:
    """Brightness, contrast and saturation of uint8 [h, w, C] times `factors` [3], in this order, as torchvision does.

    Each blends the image with black, with its mean luma, and with its luma; the result of each is cut to 0..255 and
    rounded down. A factor of 1 changes nothing.
    """
    brightness, contrast, saturation = (np.float32(factor) for factor in factors)
    if brightness != 1:
        image = _blend(image, np.float32(0), brightness)
    if contrast != 1:
        image = _blend(image, _luma(image).mean(dtype=np.float32), contrast)
    if saturation != 1 and image.shape[2] == 3:
        image = _blend(image, _luma(image), saturation)
    return image


def _luma(image: Array) -> Array:
    """uint8 [h, w, 1]."""
    if image.shape[2] == 1:
        return image
    red, green, blue = (image[..., c : c + 1].astype(np.float32) for c in range(3))
    return (np.float32(0.2989) * red + np.float32(0.587) * green + np.float32(0.114) * blue).astype(np.uint8)


def _blend(image: Array, other: Array | np.float32, factor: np.float32) -> Array:
    return np.clip(factor * image + (np.float32(1) - factor) * other, 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------- many files
def list_images(source: Path, *, every_file: bool = False) -> ImageList:
    """The images of a class-per-folder tree, of a flat folder (one class, label 0), or of a `.txt` list.

    Class folders sort into labels; hidden files are left out. With `every_file` all other files count as images, so
    that one that is none can be reported; otherwise only those with an image's extension.

    **Raises:** `UserError` if there is nothing to read, or the source is ambiguous.
    """
    if source.is_dir():
        images = _list_folder(source, every_file)
    elif source.is_file() and source.suffix.lower() == ".txt":
        images = _list_txt(source)
    else:
        raise UserError(
            f"{source} is not there or not an image source; expected a folder of class folders, "
            f"a flat folder of images, or a .txt list"
        )
    if not images.paths:
        raise UserError(
            f"{source} holds no image files; expected a folder of class folders, a flat folder of images, "
            f"or a .txt list"
        )
    return images


def _list_folder(source: Path, every_file: bool) -> ImageList:
    entries = sorted(entry for entry in source.iterdir() if not entry.name.startswith("."))
    folders, files = [e for e in entries if e.is_dir()], [e for e in entries if not e.is_dir()]
    loose = [file for file in files if file.suffix.lower() in EXTENSIONS]
    if not folders:
        chosen = files if every_file else loose
        return ImageList(tuple(map(str, chosen)), (0,) * len(chosen), (source.resolve().name,))
    if loose:
        raise UserError(
            f"{source} holds both folders and images ({loose[0].name}, {len(loose)} in all); move those "
            f"into class folders, or list the files you want in a .txt"
        )
    found = [(path, label) for label, folder in enumerate(folders) for path in _walk(folder, every_file)]
    return ImageList(tuple(p for p, _ in found), tuple(k for _, k in found), tuple(f.name for f in folders))


def _walk(folder: Path, every_file: bool) -> list[str]:
    paths, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [os.path.join(parent, name) for name in sorted(files) if not name.startswith(".")]
    return [path for path in paths if every_file or os.path.splitext(path)[1].lower() in EXTENSIONS]


def _list_txt(source: Path) -> ImageList:
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read ({error}); expected UTF-8 lines `path[<TAB>label]`") from error
    rows = [(number, *_split(line, source.parent)) for number, line in enumerate(lines, 1) if line.strip()]
    require_inside(
        source.parent, (path for _, path, _ in rows), source, "move the list to a folder that holds them all"
    )
    bare = [number for number, _, label in rows if not label]
    if bare and len(bare) < len(rows):
        raise UserError(f"{source} line {bare[0]} has no label but other lines do; label all lines or none")
    labels: tuple[list[int], tuple[str, ...]] = ([0] * len(rows), (source.stem,))
    if not bare:
        labels = _number(source, [(number, label) for number, _, label in rows])
    return ImageList(tuple(str(source.parent / path) for _, path, _ in rows), tuple(labels[0]), labels[1])


def require_inside(root: Path, paths: Iterable[str], source: Path, remedy: str) -> None:
    """Refuse a list that names files outside `root`, be it absolutely or by `..`; links in `root` are its owner's.

    **Raises:** `UserError` naming the first of them.
    """
    whole = os.path.join(os.path.abspath(root), "")
    for path in paths:
        suspicious = path.startswith("/") or ".." in path
        if suspicious and not os.path.normpath(os.path.join(whole, path)).startswith(whole):
            raise UserError(f"{source} names {path!r}, which lies outside {root}; {remedy}")


def _split(line: str, folder: Path) -> tuple[str, str]:
    """Path and label of a line. A tab separates them; without one the last space does, unless the line is a file."""
    if "\t" in line:
        path, _, label = line.rpartition("\t")
        return path.strip(), label.strip()
    line = line.strip()
    if " " not in line or (folder / line).exists():
        return line, ""
    path, _, label = line.rpartition(" ")
    return path.strip(), label


def _number(source: Path, labels: list[tuple[int, str]]) -> tuple[list[int], tuple[str, ...]]:
    """Labels as given if all are whole numbers, else the sorted names' positions; and the class names."""
    if not all(label.isdecimal() for _, label in labels):
        classes = tuple(sorted({label for _, label in labels}))
        position = {name: index for index, name in enumerate(classes)}
        return [position[label] for _, label in labels], classes
    for number, label in labels:
        if int(label) > MAX_LABEL:
            raise UserError(f"{source} line {number}: label {label} is more than {MAX_LABEL}; number classes from 0")
    numbers = [int(label) for _, label in labels]
    return numbers, tuple(str(index) for index in range(max(numbers) + 1))
