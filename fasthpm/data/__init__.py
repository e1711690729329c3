"""Loaders: prepared images in, batches of uint8 pixels out. `build_loader` picks one by the form of `data_path`."""

from fasthpm.data.build import build_loader, read_info
from fasthpm.data.options import LoaderOptions
from fasthpm.data.types import Batch, DatasetInfo, Loader

__all__ = ["Batch", "DatasetInfo", "Loader", "LoaderOptions", "build_loader", "read_info"]
