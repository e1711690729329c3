"""Real colour photographs that a machine without a network to data sets can have: Debian's wallpaper packages.

    apt-get install lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers \\
        ukui-wallpapers

Installing them (170 MB) is up to you. Their large JPEG files are found under /usr/share.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fasthpm.data.quiet import quietly
from fasthpm.errors import UserError

FOLDERS = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
PACKAGES = (
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
)
FEWEST_SOURCES = 20
SMALLEST_SIDE = 1000  # pixels of a photograph's shorter side
DECODED = (1600, 1200)  # JPEG files are decoded at 1/2 or 1/4 while that leaves more than this
NO_PHOTOGRAPHS = {  # subjects in these packages that are drawn, or have no colour
    "2004default",
    "Autumn",
    "ColdRipple",
    "Elephants",
    "Flow",
    "Fossa_by_Jasper_Roks",
    "GreenTraditional",
    "Grey",
    "Honeywave",
    "Infinite-Sea_by_Aury88",
    "Painting-Colors_by__herobrine7gamer",
    "PastelHills",
    "SafeLanding",
    "Shell",
    "Volna",
    "analogpattern_by_Peter_Nerlich",
    "firstgeneration",
    "rhythm",
    "string",
    "the-mouse",
    "umang_by_Abhishek_Mudgal",
}
SIZE_IN_NAME = re.compile(r"[_-]?\d+x\d+$")


def sources(folders: Sequence[Path] = FOLDERS) -> list[Path]:
    """Large JPEG files below `folders` in the order of their names.

    **Raises:** `UserError` naming the packages if there are fewer than `FEWEST_SOURCES`.
    """
    files = sorted(file for folder in folders for file in folder.rglob("*.jp*g") if not file.is_symlink())
    large = [file for file in files if min(_size(file)) >= SMALLEST_SIDE]
    if len(large) < FEWEST_SOURCES:
        raise UserError(
            f"{len(large)} large photographs under {', '.join(map(str, folders))}, expected {FEWEST_SOURCES} or more; "
            f"install them with: apt-get install {' '.join(PACKAGES)}"
        )
    return large


def _size(file: Path) -> tuple[int, int]:
    try:
        with quietly(), Image.open(file) as image:
            return image.size
    except OSError:
        return 0, 0


def subject(file: Path) -> str:
    """What a file shows, the same for all sizes and shades of a wallpaper: `Flow` of Flow/contents/images/1x1.jpg."""
    parts = file.with_suffix("").parts
    if "contents" in parts:
        return parts[parts.index("contents") - 1]
    return SIZE_IN_NAME.sub("", parts[-1])


def photographs(files: Sequence[Path]) -> list[Path]:
    """Those of `files` that are colour photographs, the first one of every subject, in their order."""
    first: dict[str, Path] = {}
    for file in files:
        first.setdefault(subject(file), file)
    return [file for name, file in first.items() if name not in NO_PHOTOGRAPHS]


def read_source(file: Path, decoded: tuple[int, int] = DECODED) -> Image.Image:
    """A source in RGB, at a half or a quarter of its sides while that leaves more than `decoded`."""
    image = Image.open(file)
    image.draft("RGB", decoded)
    return image.convert("RGB")
