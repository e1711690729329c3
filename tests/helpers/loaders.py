"""The kinds of loader, and what the tests of them compare."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fasthpm.data import Batch, build_loader, read_info
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.errors import UserError

N, SIZE = 23, (16, 24)
# ahead: ffcv with the look-ahead that GPUs get; clips and dali: a video set through libturbojpeg and through DALI
KINDS = ("ffcv", "shards", "arrays", "plain", "synthetic", "ahead", "clips", "dali")
OF_KIND = {"clips": {"num_frames": 3, "sampling_rate": 2}}
OF_KIND["dali"] = OF_KIND["clips"] | {"decoder": "dali"}
FIELDS = ("images", "labels", "ids", "crops", "sizes", "replaced")


def innermost(loader: Any) -> Any:
    return getattr(loader, "_loader", loader)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, field) for batch in batches]) for field in FIELDS))


def overwrite(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def refused(path: Path, message: str) -> None:
    for build in (read_info, lambda p: build_loader(p, batch_size=2, image_size=(8, 8), channels=3)):
        with pytest.raises(UserError, match=message) as error:
            build(path)
        assert "\n" not in str(error.value)


def break_sample(beton: Path, sample: int, *, keep: int = 0) -> None:
    """Overwrite a stored image with zeros, from its byte `keep` on."""
    table = open_beton(beton)
    overwrite(beton, int(table.positions[sample]) + keep, bytes(int(table.lengths[sample]) - keep))
