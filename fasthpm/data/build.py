"""The one place that chooses a loader. What a kind of source needs is imported when it is asked for."""

from pathlib import Path

from fasthpm.data.options import LoaderOptions
from fasthpm.data.sources import is_beton, is_video_set
from fasthpm.data.types import DatasetInfo, Loader
from fasthpm.errors import UserError


def read_info(data_path: str | Path) -> DatasetInfo:
    """What a data source holds, read cheaply: a prepared set's sidecar, or some images of a folder.

    **Args:** `data_path`: a prepared `.beton` or a comma list of them, a prepared video folder, an image folder
    (channels, mean and std from up to 256 of its images), or `synthetic:N`.

    **Raises:** `UserError` if it is missing, damaged or none of these.
    """
    source = str(data_path)
    if source.startswith("synthetic:"):
        from fasthpm.data.synthetic import synthetic_info

        return synthetic_info(source)
    if is_video_set(Path(source)):
        from fasthpm.data.video.prepared import open_videos

        return open_videos(Path(source)).info
    if is_beton(source):
        from fasthpm.data.ffcv.prepared import open_set

        return open_set(source).info
    from fasthpm.data.pixels import list_images
    from fasthpm.data.plain import measure_folder

    return measure_folder(list_images(Path(source)))


def build_loader(
    data_path: str | Path,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    channels: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    train: bool = True,
    crop_min: float = 0.2,
    flip: bool = True,
    crop_pct: float | None = None,
    accum_iter: int = 1,
    interpolation: str = "bicubic",
    color_jitter: float = 0.0,
    sample_order: str = "random",
    max_bad_samples: float | None = None,
    num_frames: int = 1,
    sampling_rate: int = 1,
    crop: str = "auto",
    views: tuple[int, int] = (1, 1),
    decoder: str = "auto",
    whole: bool = False,
    frame_sampling: str = "dense",
) -> Loader:
    """A `Loader` of `data_path`: FFCV for a `.beton`, PIL for a folder of images, drawn images for `synthetic:N`.

    A `.beton` may be in shards (`X.json` lists them), and a comma list of sets is used as one. A folder that
    `data_prep.videos` wrote is a set of videos.

    **Args:**

    - `batch_size`: samples per rank and batch; `image_size`: (height, width) of what comes out, in pixels.
    - `channels`: 1 or 3, as the set has them; synthetic images have as many as asked for.
    - `num_workers`: decoding threads of this rank, at most the cores there are; 0 = cores / LOCAL_WORLD_SIZE.
    - `train`: shuffled by (seed, epoch), random resized crops of `crop_min` to 1 of the area and, with `flip`, random
      mirroring; only full global batches. Otherwise in order, the centre (`crop_pct` of the largest box; None is 0.875,
      or 1 when all stored images have `image_size` already), each sample once over all ranks, in batches of which the
      last may be smaller, on some ranks empty.
    - `interpolation`: how crops are resized, "bicubic" (PIL's, antialiased) or "area" (pixel areas averaged).
    - `color_jitter`: in training, brightness, contrast and saturation are multiplied by 1 ± up to this; 0 = not.
    - `sample_order`: "random", or "blocks" for sets larger than memory: neighbours in storage are read together, and
      shuffled within a pool of about 1 GiB (`sampling.block_order`).
    - `max_bad_samples`: a sample that does not decode is replaced by another, which (seed, epoch, sample id) decide;
      once more distinct ones than this share of the set are met (10 are always put up with; 0 = none), loading fails.
      None: 0.001 in training; without `train` the first one is an error, and none is replaced.
    - `num_frames`, `sampling_rate`: T frames of each video, every `sampling_rate`-th one; 1 frame: images. In training
      a clip begins anywhere, drawn from (seed, epoch, sample id); otherwise in the middle. Short videos are looped.
    - `frame_sampling`: of prepared videos, "dense": clips as above; "segments": one frame of each of T equal stretches
      of the whole video, drawn in training, otherwise their middles (VideoMAE's fine-tuning on SSv2).
    - `crop`: of training, "random_resized", or "multi_scale" as VideoMAE pretrains; "auto": that for videos.
    - `views`: of videos, (clips, crops): every sample gives clips * crops rows one after the other, with the same id:
      in evaluation evenly spaced clips of the video times crops along its longer side, to average predictions over
      (VideoMAE: 5, 3 for Kinetics, 2, 3 for SSv2); in training (r, 1), r draws (repeated augmentation).
    - `decoder`: of videos, "turbojpeg" (libturbojpeg and our kernel, the "auto"); "dali", DALI on the CPU; "dali_gpu",
      DALI and nvJPEG: batches are on the GPU; "dali_video", DALI on the video files of a set prepared with --copy, by
      NVDEC where there is a GPU.
    - `whole`: without `train`, the whole image instead of its centre, squeezed into `image_size`.
    - `accum_iter`: batches per update. A training epoch holds whole updates only, so that it has the same samples
      however an update is cut into batches.

    **Raises:** `UserError` for a source that is missing, damaged or has other channels, and for values out of range.
    """
    source = str(data_path)
    options = LoaderOptions(
        batch_size=batch_size,
        image_size=image_size,
        channels=channels,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        train=train,
        crop_min=crop_min,
        flip=flip,
        crop_pct=crop_pct,
        accum_iter=accum_iter,
        interpolation=interpolation,
        color_jitter=color_jitter,
        sample_order=sample_order,
        max_bad_samples=max_bad_samples,
        num_frames=num_frames,
        sampling_rate=sampling_rate,
        crop=crop,
        views=views,
        decoder=decoder,
        whole=whole,
        frame_sampling=frame_sampling,
    )
    if source.startswith("synthetic:"):
        from fasthpm.data.synthetic import SyntheticLoader

        return SyntheticLoader(source, options)
    if is_video_set(Path(source)):
        return clip_loader(Path(source), options)
    beton = is_beton(source)
    if num_frames > 1 or options.num_views > 1:
        raise UserError(
            f"data_path {source} holds no prepared videos; use --num_frames 1 for images, or a folder that python -m "
            f"data_prep.videos wrote"
        )
    if beton:
        from fasthpm.data.ffcv.images import FfcvLoader

        return FfcvLoader(source, options)
    from fasthpm.data.plain import PlainLoader

    return PlainLoader(Path(source), options)


def clip_loader(path: Path, options: LoaderOptions) -> Loader:
    """The loader that `options.decoder` names."""
    from fasthpm.data.video.clips import ClipLoader

    if options.decoder in ("auto", "turbojpeg"):
        return ClipLoader(path, options)
    from fasthpm.data.video.dali import DaliFrames, DaliVideos

    return DaliVideos(path, options) if options.decoder == "dali_video" else DaliFrames(path, options)
