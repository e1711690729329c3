"""Photograph-like images, and samples in memory for the kernel that decodes them."""

from io import BytesIO

import numpy as np
from PIL import Image

from fasthpm.data.ffcv.kernel import BICUBIC, decode

JPEG, RAW = 0, 1
RESTARTS = ({}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1})


def photograph(index: int, height: int, width: int) -> Image.Image:
    """Smooth colours, edges of brightness and of colour, a little noise; nothing near black or white."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-2, 2, (3, 3))]
    edges = (np.sin(x * y * 9) > 0.3)[..., None] * rng.uniform(-35, 35, 3)
    pixels = 128 + 40 * np.stack(waves, -1) + edges + rng.normal(0, 3, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


class Samples:
    """Samples in memory under a table like that of an open set."""

    def __init__(self, blobs: list[bytes], sizes: list[tuple[int, int]], mode: int = JPEG) -> None:
        self.memory = [np.frombuffer(blob, np.uint8) for blob in blobs]
        self.sizes = np.array(sizes, np.int64)
        self.table = (
            np.array([array.ctypes.data for array in self.memory], np.uint64),
            np.array([len(array) for array in self.memory], np.uint64),
            np.full(len(blobs), mode, np.uint8),
            *np.ascontiguousarray(self.sizes.T.astype(np.uint16)),
        )

    def decode(self, crops, size, *, ids=None, channels=3, interpolation=BICUBIC, jitter=None):
        """Images and statuses of crops [b, 5]; both start from values that the kernel must replace."""
        crops = np.array(crops, np.int64).reshape(-1, 5)
        ids = np.arange(len(crops)) if ids is None else np.asarray(ids, np.int64)
        images = np.full((len(ids), *size, channels), 77, np.uint8)
        status = np.full(len(ids), -1, np.int32)
        jitter = np.ones((len(ids), 3), np.float32) if jitter is None else np.asarray(jitter, np.float32)
        decode(self.table, ids, crops, jitter, images, status, interpolation)
        return images, status
