"""What kind of data source a `data_path` names."""

import os
from pathlib import Path

from fasthpm.errors import UserError


def is_video_set(path: Path) -> bool:
    """Whether `path` is a folder that `data_prep.videos` wrote, or what is left of one."""
    info, *data = (os.path.join(path, name) for name in ("info.json", "frames.bin", "videos.npy"))
    return os.path.isfile(info) and any(map(os.path.exists, data))  # False where we may not look, unlike Path's


def split_sources(source: str) -> list[str]:
    """The names in a comma list; a name that is there with its commas stays whole."""
    there = os.path.exists(source)  # unlike Path.exists, no error for a list longer than a name may be
    return source.split(",") if "," in source and not there else [source]


def is_beton(source: str) -> bool:
    """Whether `source` names a prepared set; also refuses what names no data at all."""
    if not source:
        raise UserError("data_path is empty; give --data_path a prepared .beton, an image folder, or synthetic:N")
    path, names = Path(source), split_sources(source)
    if len(names) > 1:
        for name in names:
            if not name.endswith(".beton"):
                raise UserError(
                    f"data_path {source} joins {name!r}, which is no .beton; only prepared sets can be joined"
                )
        return True
    if path.suffix == ".beton" or (path.is_file() and path.suffix.lower() not in (".txt", ".csv")):
        if path.suffix != ".beton":
            raise UserError(
                f"data_path {source} is a file but no .beton; give a prepared .beton, an image folder, or synthetic:N"
            )
        return True
    return False
