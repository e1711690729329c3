"""Image files on disk: finding them, and turning any kind of them into 8-bit RGB."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fasthpm.data.labels import number_labels
from fasthpm.data.listing import Kind, list_folder
from fasthpm.data.lists import LISTS, read_list, require_inside
from fasthpm.data.sampling import Array, crop_resize
from fasthpm.errors import UserError

EXTENSIONS = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jp2", ".j2k", ".jpx", ".png", ".apng", ".gif", ".webp", ".avif"),
        *(".bmp", ".dib", ".pbm", ".pgm", ".ppm", ".pnm", ".tif", ".tiff", ".tga"),
    ]
)
BITS_PER_SAMPLE, SAMPLE_FORMAT, SIGNED = 258, 339, 2  # tags of a TIFF, and a value of the latter
UNKNOWN_RANGE = "integers of 32 bits or with a sign, whose range is unknown ({span}); save 8 or 16 bits without a sign"
SCALED = ("PNG", "PPM")  # formats whose wide integers PIL gives in 0..65535, whatever their mode


def _looks_like_image(start: bytes) -> bool:
    """Whether a file that begins so is an image of a common kind."""
    begins = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
    brand = start[8:12] if start[4:8] == b"ftyp" else b""
    webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    bmp = start[:2] == b"BM" and start[6:10] == bytes(4)
    return start.startswith(begins) or brand in (b"avif", b"avis") or webp or bmp


IMAGES = Kind("images", EXTENSIONS, _looks_like_image)


@dataclass(frozen=True)
class ImageList:
    """Files and what they show: `labels[i]` indexes `classes`, or is `UNLABELLED`."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    words: tuple[str, ...] = ()  # what was left out, for people


# ------------------------------------------------------------------------------------------------------- one image
def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as upright 8-bit RGB.

    EXIF rotation is applied; transparency (alpha, or a palette or colour marked transparent) is laid over white;
    16-bit grey is scaled by 1/257, not clipped, that of fewer bits by its own range; CMYK is converted without its
    colour profile; of an animation the first frame is taken.

    **Raises:** `ValueError` for pixels whose range is unknown (integers of 32 bits or with a sign, floats outside
    0..1), and what PIL raises for damaged files.
    """
    source, image = image, _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image, _white(source)).convert("RGB")
    if SIGNED in getattr(source, "tag_v2", {}).get(SAMPLE_FORMAT, ()):
        raise ValueError(UNKNOWN_RANGE.format(span=f"8 bits, mode {image.mode}"))
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


def _white(image: Image.Image) -> float:
    """The value of white of grey with 16 bits or more, or float; 0 where nothing tells."""
    if image.mode == "F":
        return 1.0
    if image.mode.startswith("I;16"):
        (bits, *_) = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
        return float(2**bits - 1)
    return 65535.0 if image.format in SCALED else 0.0


def _scaled(image: Image.Image, white: float) -> Image.Image:
    """Grey of 16 or 32 bits, or float, as 8-bit grey."""
    values = np.asarray(image).astype(np.float64)
    span = f"pixels span {values.min():g} to {values.max():g}"
    if not white:
        raise ValueError(UNKNOWN_RANGE.format(span=span))
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"{image.mode} {span}, expected 0 to {white:g}")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


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
    """The images of a class-per-folder tree, of a flat folder (one class, label 0), or of a `.txt` or `.csv` list.

    Class folders sort into labels; hidden files and others that `listing` knows are left out. With `every_file` all
    other files count as images, so that one that is none can be reported; otherwise only those with an image's
    extension or first bytes.

    **Raises:** `UserError` if there is nothing to read, or the source is ambiguous.
    """
    if source.is_dir():
        found = list_folder(source, IMAGES, every_file=every_file)
        images = ImageList(tuple(found.paths), tuple(found.labels), found.classes, found.words)
    elif source.is_file() and source.suffix.lower() in LISTS:
        images = _list_lines(source)
    else:
        raise UserError(
            f"{source} is not there or not an image source; expected a folder of class folders, "
            f"a flat folder of images, or a .txt or .csv list"
        )
    if not images.paths:
        raise UserError(
            f"{source} holds no image files; expected a folder of class folders, a flat folder of images, "
            f"or a .txt or .csv list{'; '.join(('', *images.words))}"
        )
    return images


def _list_lines(source: Path) -> ImageList:
    lines, root = read_list(source, source.parent), source.parent
    require_inside(root, (line.path for line in lines), source, "move the list to a folder that holds them all")
    bare = [line.number for line in lines if line.label is None]
    if bare and len(bare) < len(lines):
        raise UserError(f"{source} line {bare[0]} has no label but other lines do; label all lines or none")
    paths = tuple(str(root / line.path) for line in lines)
    if bare or not lines:
        return ImageList(paths, (0,) * len(paths), (source.stem,))
    texts = [line.label or "" for line in lines]
    labels, classes = number_labels(texts, lambda k: f"{source} line {lines[k].number}")
    return ImageList(paths, tuple(labels.tolist()), classes)
