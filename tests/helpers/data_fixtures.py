"""Small image folders and prepared sets for the tests of the data path."""

import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import images


def picture(index: int, size: tuple[int, int] = (40, 48), *, grey: bool = False) -> Image.Image:
    """A smooth, textured image, different for every index: height x width of `size`."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    return image.convert("L") if grey else image


def image_folder(
    folder: Path, count: int, *, grey: bool = False, sizes: tuple[tuple[int, int], ...] = ((40, 48),)
) -> Path:
    """`count` PNG files in class folders ant and bee, whose sizes take turns."""
    for index in range(count):
        target = folder / ("ant", "bee")[index % 2]
        target.mkdir(parents=True, exist_ok=True)
        picture(index, sizes[index % len(sizes)], grey=grey).save(target / f"{index:03d}.png")
    return folder


def prepare(source: Path, out: Path, *flags: str) -> Path:
    """Run `data_prep.images`."""
    images.main([str(source), str(out), "--num_workers", "2", *flags])
    return out


def prepare_shards(folder: Path, out: Path, count: int, *flags: str) -> Path:
    """The images of `folder` in `count` shards and their index in `out`'s place; returns `out`."""
    paths = sorted(path for path in folder.rglob("*.png"))
    names, sidecars = [f"{out.stem}-{k:05d}-of-{count:05d}.beton" for k in range(count)], []
    for k, name in enumerate(names):
        part = out.parent / f"part{k}.txt"
        part.write_text("".join(f"{path}\t{path.parent.name}\n" for path in paths[k::count]))
        prepare(part, out.parent / name, *flags)
        sidecars.append(json.loads((out.parent / name).with_suffix(".json").read_text()))
    index = {name: sidecars[0][name] for name in ("channels", "mean", "std", "classes")}
    index |= {"format": "ffcv-shards", "shards": names, "num_samples": len(paths)}
    out.with_suffix(".json").write_text(json.dumps(index))
    return out


def list_sources(out: Path, names: list[str]) -> None:
    """Write the list of source files beside a prepared set."""
    with out.with_suffix(".files.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([["path"], *([name] for name in names)])


def jpeg_bytes(image: Image.Image, **options: object) -> bytes:
    """`image` as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()
