"""`Batch`, `DatasetInfo`, the `Loader` protocol, and the one place that chooses a loader."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fasthpm.errors import UserError

if TYPE_CHECKING:
    from fasthpm.data.quarantine import BadSample


@dataclass(frozen=True)
class Batch:
    """One rank's share of a micro-batch. B samples; every tensor is the batch's own memory, never reused."""

    images: Tensor  # uint8 [B, H, W, C], or clips [B, T, H, W, C]
    labels: Tensor  # int64 [B]
    ids: Tensor  # int64 [B], index of each sample in the data set
    crops: Tensor  # int64 [B, 5]: top, left, height, width of the crop in the stored image, and whether it was flipped
    sizes: Tensor  # int64 [B, 2]: height, width of the stored image
    replaced: Tensor  # bool [B]: the sample whose turn it was does not decode, this is another one
    maps: Tensor = dataclasses.field(
        default_factory=lambda: torch.zeros(0)
    )  # float16 [B, rows, cols]; see fasthpm.maps

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; asynchronous where the source is pinned."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class DatasetInfo:
    """What the sidecar of a prepared set says (`OUT.json` beside `OUT.beton`)."""

    num_samples: int
    channels: int
    mean: tuple[float, ...]  # per channel, of pixels scaled to 0..1
    std: tuple[float, ...]
    classes: tuple[str, ...]


class Loader(Protocol):
    """What training and probes need of a data source; every implementation passes `tests/test_loaders.py`.

    The order of samples is drawn for the *global* batch and then split, so any number of ranks sees the same batches:
    global batch b of an epoch is order[b*G:(b+1)*G] with G = batch_size * world_size, and rank r takes rows
    [r*batch_size, (r+1)*batch_size) of it. Crops, flips, colours and what replaces a sample that does not decode are
    functions of (seed, epoch, sample id) alone.
    """

    info: DatasetInfo
    batch_size: int

    def __len__(self) -> int:
        """Batches per epoch of this rank."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch from the current position; afterwards the next epoch is current."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`."""

    def state_dict(self) -> dict[str, Any]:
        """{"epoch", "batch"} of the next batch that the consumer has not been given."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_dict` gave."""

    def bad_samples(self) -> list["BadSample"]:
        """The samples that this rank met so far and that do not decode, each once."""

    def close(self) -> None:
        """Stop threads and free buffers; safe to call twice."""


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
        from fasthpm.data.video_set import open_videos

        return open_videos(Path(source)).info
    if _is_beton(source):
        from fasthpm.data.prepared import open_set

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
    from fasthpm.data.prefetch import LoaderOptions

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
        from fasthpm.data.clips import clip_loader

        return clip_loader(Path(source), options)
    beton = _is_beton(source)
    if num_frames > 1 or options.num_views > 1:
        raise UserError(
            f"data_path {source} holds no prepared videos; use --num_frames 1 for images, or a folder that python -m "
            f"data_prep.videos wrote"
        )
    if beton:
        from fasthpm.data.ffcv_images import FfcvLoader

        return FfcvLoader(source, options)
    from fasthpm.data.plain import PlainLoader

    return PlainLoader(Path(source), options)


def is_video_set(path: Path) -> bool:
    """Whether `path` is a folder that `data_prep.videos` wrote, or what is left of one."""
    return (path / "info.json").is_file() and ((path / "frames.bin").exists() or (path / "videos.npy").exists())


def split_sources(source: str) -> list[str]:
    """The names in a comma list; a name that is there with its commas stays whole."""
    there = os.path.exists(source)  # unlike Path.exists, no error for a list longer than a name may be
    return source.split(",") if "," in source and not there else [source]


def _is_beton(source: str) -> bool:
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
    if path.suffix == ".beton" or (path.is_file() and path.suffix.lower() != ".txt"):
        if path.suffix != ".beton":
            raise UserError(
                f"data_path {source} is a file but no .beton; give a prepared .beton, an image folder, or synthetic:N"
            )
        return True
    return False
