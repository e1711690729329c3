"""The compiled decoding loop over FFCV's C library. Importing it loads numba and that library; see `ffcv_images`.

numba keeps the compiled loop in `__pycache__` beside this file, else (not writable) in the user's cache folder;
NUMBA_CACHE_DIR moves it. Where none is writable, each process compiles for itself (some seconds).
"""

import contextlib
import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types

from fasthpm.data.beton import JPEG

u32, u64, i64, boolean = types.uint32, types.uint64, types.int64, types.boolean


def find_library() -> Path:
    """FFCV's shared object, found without importing FFCV, which would pull in its loader and OpenCV's Python module.

    **Raises:** `ImportError` if FFCV is not installed.
    """
    spec = importlib.util.find_spec("ffcv")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("_libffcv*.so")):
            return path
    raise ImportError("no module named 'ffcv'")


def _load_symbols() -> None:
    """Tell LLVM where the C functions are, under names of our own: theirs (`resize`) could be anybody's."""
    library = ctypes.CDLL(str(find_library()))
    for name in ("imdecode", "resize"):
        llvm.add_symbol(f"fasthpm_ffcv_{name}", ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    # OpenCV would split each resize over all cores, underneath our own threads. (FFCV can be built without OpenCV.)
    with contextlib.suppress(AttributeError):
        library["_ZN2cv13setNumThreadsEi"](ctypes.c_int(1))


_load_symbols()
_imdecode = types.ExternalFunction(
    "fasthpm_ffcv_imdecode", types.int32(u64, u64, u32, u32, u64, u32, u32, u32, u32, u32, u32, boolean, boolean)
)
_resize = types.ExternalFunction("fasthpm_ffcv_resize", types.void(*[i64] * 11))


def _decode(
    base: Any,
    table: Any,
    ids: Any,
    crops: Any,
    images: Any,
    status: Any,
) -> None:
    positions, lengths, modes, heights, widths = table
    out_height, out_width, channels = images.shape[1], images.shape[2], images.shape[3]
    largest = np.int64(1)
    for k in range(len(ids)):
        if modes[ids[k]] == JPEG:
            largest = max(largest, np.int64(heights[ids[k]]) * np.int64(widths[ids[k]]) * 3)
    scratch = np.zeros(largest, np.uint8)
    resized = np.empty((out_height, out_width, 3), np.uint8)
    for k in range(len(ids)):
        i = ids[k]
        height, width = np.int64(heights[i]), np.int64(widths[i])
        source = base + np.int64(positions[i])
        status[k] = 0
        if modes[i] == JPEG:
            pixels = scratch.ctypes.data
            status[k] = _imdecode(source, lengths[i], height, width, pixels, height, width, 0, 0, 1, 1, False, False)
            source = np.int64(pixels)
        top, left, bottom, right = crops[k, 0], crops[k, 1], crops[k, 0] + crops[k, 2], crops[k, 1] + crops[k, 3]
        target = resized.ctypes.data
        _resize(0, source, height, width, top, bottom, left, right, target, out_height, out_width)
        for y in range(out_height):
            for x in range(out_width):
                column = out_width - 1 - x if crops[k, 4] else x
                for c in range(channels):
                    images[k, y, x, c] = resized[y, column, c]
    # Reads that keep both buffers alive past the C calls, of which the compiler sees addresses only.
    scratch[0] = scratch[0]
    resized[0, 0, 0] = resized[0, 0, 0]


_TABLE = types.Tuple((u64[::1], u64[::1], types.uint8[::1], types.uint16[::1], types.uint16[::1]))
_SIGNATURE = types.void(i64, _TABLE, i64[::1], i64[:, ::1], types.uint8[:, :, :, ::1], types.int32[::1])


def _compile() -> Any:
    try:
        return numba.njit(_SIGNATURE, nogil=True, cache=True)(_decode)
    except RuntimeError as error:
        if "cache" not in str(error):
            raise
        return numba.njit(_SIGNATURE, nogil=True)(_decode)  # no folder to cache in


decode = _compile()
"""`decode(base, table, ids, crops, images, status)`: cut, resize and mirror samples of a mapped `.beton`; no GIL held.

`base`: address of the mapped file. `table`: positions and lengths uint64 [N], modes uint8 [N], heights and widths
uint16 [N]. `ids` int64 [b], `crops` int64 [b, 5], `images` uint8 [b, H, W, C] to write (C 1 takes the first channel),
`status` int32 [b] to write: turbojpeg's return code, 0 if all is well. Nothing is checked: `open_beton` did.
"""
