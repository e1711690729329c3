"""libturbojpeg, found and made known to compiled code. It needs neither FFCV nor any other Python package."""

import ctypes
import ctypes.util
import importlib.util
from pathlib import Path

import llvmlite.binding as llvm

FUNCTIONS = (
    "tjInitDecompress",
    "tjDecompressHeader3",
    "tjDecompressToYUVPlanes",
    "tjDecompress2",
    "tjGetErrorCode",
    "tjDestroy",
)


def load_library() -> ctypes.CDLL:
    """libturbojpeg 2.0 or newer: the system's, else the one that FFCV's own library is linked with.

    **Raises:** `ImportError` if there is none.
    """
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
            for function in FUNCTIONS:
                getattr(library, function)
        except (OSError, AttributeError):
            continue
        return library
    raise ImportError("no library libturbojpeg 2.0 or newer; Debian and Ubuntu name it libturbojpeg0")


def _candidates() -> list[str]:
    names = [ctypes.util.find_library("turbojpeg"), "libturbojpeg.so.0"]
    ffcv = importlib.util.find_spec("ffcv")  # finds it without importing it
    for folder in (ffcv.submodule_search_locations or ()) if ffcv else ():
        names += [str(path) for path in sorted(Path(folder).glob("_libffcv*.so"))]
    return [name for name in names if name]


def export_functions() -> None:
    """Tell LLVM where the C functions are, and two of libc's, as `fasthpm_…`: plain names could be anybody's.

    **Raises:** `ImportError` as `load_library`.
    """
    library = load_library()
    for name in FUNCTIONS:
        llvm.add_symbol(f"fasthpm_{name}", ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    for name in ("memchr", "memcpy"):
        llvm.add_symbol(f"fasthpm_{name}", ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value)
