"""The one place that chooses a loader. What a kind of source needs is imported when it is asked for."""

from pathlib import Path
from typing import Any

from fasthpm.data.options import OF_IMAGES, LoaderOptions
from fasthpm.data.sources import is_beton, is_video_set
from fasthpm.data.statistics import as_read
from fasthpm.data.types import DatasetInfo, Loader
from fasthpm.errors import UserError


def read_info(data_path: str | Path, channels: int = 0) -> DatasetInfo:
    """What a data source holds, read cheaply: a prepared set's sidecar, or some images of a folder.

    **Args:** `data_path`: a prepared `.beton` or a comma list of them, a prepared video folder, an image folder
    (channels, mean and std from up to 256 of its images), or `synthetic:N`; `channels`: in how many channels it is
    read, as `build_loader` does it, 0 = as many as it has.

    **Raises:** `UserError` if it is missing, damaged or none of these.
    """
    source = str(data_path)
    if source.startswith("synthetic:"):
        from fasthpm.data.synthetic import synthetic_info

        return synthetic_info(source, channels or 3)
    info = _stored_info(source)
    return as_read(info, channels, source) if channels else info


def _stored_info(source: str) -> DatasetInfo:
    if is_video_set(Path(source)):
        from fasthpm.data.video.prepared import open_videos

        return open_videos(Path(source)).info
    if is_beton(source):
        from fasthpm.data.ffcv.prepared import open_set

        return open_set(source).info
    from fasthpm.data.pixels import list_images
    from fasthpm.data.plain import measure_folder

    return measure_folder(list_images(Path(source)))


def build_loader(data_path: str | Path, options: LoaderOptions | None = None, **keywords: Any) -> Loader:
    """A `Loader` of `data_path`: FFCV for a `.beton`, PIL for a folder of images, drawn images for `synthetic:N`.

    A `.beton` may be in shards (`X.json` lists them), and a comma list of sets is used as one. A folder that
    `data_prep.videos` wrote is a set of videos.

    **Args:** `options`, or `keywords` to make them of: the fields of `LoaderOptions`.

    **Raises:** `UserError` for a source that is missing or damaged, and for values out of range.
    """
    source = str(data_path)
    options = _options(options, keywords)
    if source.startswith("synthetic:"):
        from fasthpm.data.synthetic import SyntheticLoader

        return SyntheticLoader(source, options)
    if is_video_set(Path(source)):
        return clip_loader(Path(source), options)
    beton = is_beton(source)
    if options.num_frames > 1 or (options.num_views > 1 and not options.image_views):
        raise UserError(
            f"data_path {source} holds no prepared videos; use --num_frames 1 for images, or a folder that python -m "
            f"data_prep.videos wrote"
        )
    if beton:
        from fasthpm.data.ffcv.arrays import prepared_loader

        return prepared_loader(source, options)
    from fasthpm.data.plain import PlainLoader

    return PlainLoader(Path(source), options)


def _options(options: LoaderOptions | None, keywords: dict[str, Any]) -> LoaderOptions:
    if options is None:
        return LoaderOptions(**keywords)
    if keywords:
        raise TypeError(f"build_loader got options and {', '.join(keywords)} beside them; use dataclasses.replace")
    return options


def clip_loader(path: Path, options: LoaderOptions) -> Loader:
    """The loader that `options.decoder` names."""
    from fasthpm.data.video.clips import ClipLoader

    for name in (name for name in OF_IMAGES if getattr(options, name)):
        raise UserError(f"{name} is {getattr(options, name)}, and {path} holds videos; it is of images: leave it out")
    if options.decoder in ("auto", "turbojpeg"):
        return ClipLoader(path, options)
    from fasthpm.data.video.dali import DaliFrames, DaliVideos

    return DaliVideos(path, options) if options.decoder == "dali_video" else DaliFrames(path, options)
