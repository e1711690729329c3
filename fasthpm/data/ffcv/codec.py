"""How the values of an array are laid out in a prepared set: as they are, or compressed without loss in bands of rows.

`raw` is the array [H, W, C] itself, little endian. `lz4` is, in this order and little endian:

    uint32          R, rows of a band; the last one may have fewer
    uint32 [n, b]   bytes of every block: n = ceil(H / R) bands, b bytes of a value
    blocks          band after band; of each, byte 0 of all its values, byte 1 …

A block has its bytes in the order [C, rows, W], so that those of one channel are neighbours: high bytes of 16 bits
hardly change. It is in LZ4's block format, or as it is where that is no shorter. A crop reads the bands it touches.
Training unpacks blocks by itself (`array_kernel`); here it is the package lz4, plainly.
"""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasthpm.errors import UserError

Array = NDArray[Any]

CODECS = ("raw", "lz4")
BAND_BYTES = 64 << 10  # of a band before it is compressed, about: half of what LZ4 looks back over
SIZE = np.dtype("<u4")


def compress(array: Array, codec: str) -> bytes:
    """The bytes of an array [H, W, C] in a prepared set.

    **Raises:** `UserError` for an unknown codec, and for lz4 where its package is missing.
    """
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    if codec == "raw":
        return plain.tobytes()
    lz4, rows = _lz4(codec), rows_of_band(plain.shape, plain.itemsize)
    sizes, blocks = [], []
    for start in range(0, len(plain), rows):
        for plane in _planes(plain[start : start + rows]):
            packed = lz4.compress(plane, store_size=False, mode="default")
            blocks.append(packed if len(packed) < len(plane) else plane)
            sizes.append(len(blocks[-1]))
    return b"".join([np.array([rows, *sizes], SIZE).tobytes(), *blocks])


def decompress(data: bytes, codec: str, shape: tuple[int, int, int], dtype: str) -> Array:
    """The array [H, W, C] of what `compress` gave.

    **Raises:** `ValueError` for data that is not of this shape and type or is damaged; `UserError` as `compress`.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    if codec == "raw":
        return np.frombuffer(data, kind).reshape(shape).astype(dtype)
    lz4, (height, width, channels) = _lz4(codec), shape
    rows = int(np.frombuffer(data, SIZE, 1)[0])
    if not 1 <= rows <= height:
        raise ValueError(f"bands of {rows} rows, and the array has {height}")
    bands = -(-height // rows)
    sizes = np.frombuffer(data, SIZE, bands * kind.itemsize, SIZE.itemsize)
    out, at = np.empty((bands * rows, width, channels, kind.itemsize), np.uint8), SIZE.itemsize * (1 + len(sizes))
    for block, size in enumerate(sizes.tolist()):
        band, byte = divmod(block, kind.itemsize)
        count = min(rows, height - band * rows)
        length, packed = count * width * channels, data[at : at + size]
        plane = packed if size == length else _unpacked(lz4, packed, length)
        if len(plane) != length:
            raise ValueError(f"block {block} has {len(plane)} bytes, expected {length}")
        values = np.frombuffer(plane, np.uint8).reshape(channels, count, width)
        out[band * rows : band * rows + count, :, :, byte] = values.transpose(1, 2, 0)
        at += size
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes follow the last block")
    return out[:height].view(kind)[..., 0].astype(dtype)


def rows_of_band(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of a band of an array [H, W, C]."""
    return max(1, min(shape[0], BAND_BYTES // (shape[1] * shape[2] * itemsize)))


def _planes(band: Array) -> list[bytes]:
    """Byte 0 of all values, byte 1 …: each in the order [C, rows, W]."""
    split = np.ascontiguousarray(band.transpose(2, 0, 1)).view(np.uint8).reshape(-1, band.itemsize)
    return [np.ascontiguousarray(split[:, byte]).tobytes() for byte in range(band.itemsize)]


def _unpacked(lz4: Any, packed: bytes, length: int) -> bytes:
    try:
        plain: bytes = lz4.decompress(packed, uncompressed_size=length)
    except Exception as error:  # the package's own kind
        raise ValueError(str(error)) from error
    return plain


def _lz4(codec: str) -> Any:
    if codec not in CODECS:
        raise UserError(f"codec is {codec!r}, expected one of {', '.join(CODECS)}")
    try:
        return import_module("lz4.block")
    except ImportError as error:
        raise UserError("codec lz4 needs the package lz4; install it with pip install lz4, or use raw") from error
