"""Clips of prepared videos through NVIDIA DALI: the same samples, clips and crops as `clips`, decoded by DALI.

`DaliFrames` has DALI's image decoder read the stored JPEG frames, on the CPU or by nvJPEG; `DaliVideos` has its video
decoder read the video files that `data_prep.videos --copy` keeps, by NVDEC where there is a GPU, else on the CPU, which
takes VP8, VP9 and MJPEG only; either way DALI reads all colours as BT.601's, which `--copy` sees to. Both feed a
pipeline from outside, one batch per run: DALI's own readers enumerate clips and cannot draw one per video and epoch
from a seed.
"""

import contextlib
import importlib
import os
import weakref
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthpm.data.jpegs import whole_header
from fasthpm.data.options import LoaderOptions
from fasthpm.data.sampling import Array
from fasthpm.data.video.clips import ClipLoader
from fasthpm.data.video.prepared import copied_file
from fasthpm.errors import UserError

HEADER = 2048  # bytes in which a stored frame's header ends
CPU_CODECS = ("mjpeg", "vp8", "vp9")
NO_SAMPLE = (
    "out of memory",
    "OUT_OF_MEMORY",
    "bad_alloc",
    "illegal memory access",
)  # DALI's words for what is no fault of a sample

_ALIVE: weakref.WeakSet[Any] = weakref.WeakSet()
# What a forked process got of its parent's pipelines: their threads are not there, and ending them would crash it.
_INHERITED: list[Any] = []
os.register_at_fork(after_in_child=lambda: _INHERITED.extend(_ALIVE))


def _dali(module: str) -> Any:
    try:
        return importlib.import_module(f"nvidia.dali.{module}")
    except (ImportError, OSError) as error:
        raise UserError(
            f"reading videos with DALI needs nvidia-dali-cuda130 ({error}); pip install 'fasthpm[video]', or use "
            f"--video_decoder turbojpeg"
        ) from error


class DaliLoader(ClipLoader):
    """What both have in common: a pipeline that is run once per batch, and made anew after an error."""

    gpu = False

    def __init__(self, path: Path, options: LoaderOptions) -> None:
        self._pipeline: Any = None
        self._stream: Any = None  # of copies on the GPU: what training has queued on its own would have to end first
        if options.interpolation != "bicubic" or options.color_jitter:
            raise UserError(
                f"decoder {options.decoder} resizes bicubic and changes no colours; interpolation is "
                f"{options.interpolation}, color_jitter {options.color_jitter:g}: use decoder turbojpeg for these"
            )
        for module in ("fn", "types", "pipeline"):
            _dali(module)
        super().__init__(path, options)

    def _open_decoder(self, options: LoaderOptions) -> None:
        return None

    def close(self) -> None:
        super().close()
        self._pipeline = None  # ends DALI's threads

    # ---------------------------------------------------------------------------------------------- for subclasses
    @property
    def samples_per_clip(self) -> int:
        """How many inputs of the pipeline make a clip."""
        return 1

    @abstractmethod
    def _outputs(self) -> Any:
        """What the pipeline makes of its inputs: uint8 [T, H, W, C] or [H, W, C] per sample."""

    def _sound(self, ids: Array, crops: Array) -> bool:
        """Whether DALI can be given these clips."""
        return True

    @abstractmethod
    def _inputs(self, ids: Array, crops: Array) -> dict[str, Any]:
        """What it is fed for these clips."""

    # ---------------------------------------------------------------------------------------------- running
    def _empty(self, count: int, pin: bool = False) -> Tensor:
        if not self.gpu:
            return super()._empty(count, pin)
        training = torch.cuda.current_stream()
        with self._aside():
            images = torch.empty((count, *self.options.sample_shape), dtype=torch.uint8, device="cuda")
        images.record_stream(training)  # its memory is used anew when that stream, too, is done with it
        return images

    def _fill_in_parallel(self, images: Tensor, ids: Array, crops: Array, factors: Array) -> Array:
        """Decode a batch; clip by clip where DALI refuses it as a whole, to find out which it is."""
        if not len(ids):
            return np.zeros(0, np.bool_)
        if self._run(images, ids, crops):
            return np.zeros(len(ids), np.bool_)
        bad = [not self._run(images[k : k + 1], ids[k : k + 1], crops[k : k + 1]) for k in range(len(ids))]
        return np.array(bad)

    def _run(self, images: Tensor, ids: Array, crops: Array) -> bool:
        """Whether these clips decode; if so, into `images`."""
        if not self._sound(ids, crops):
            return False
        if self._pipeline is None:
            self._pipeline = self._define(torch.cuda.current_device() if self.gpu else None)
            self._pipeline.build()
            _ALIVE.add(self._pipeline)
        try:
            for name, values in self._inputs(ids, crops).items():
                self._pipeline.feed_input(name, values)
            (output,) = self._pipeline.run()
            with self._aside():
                _copy(output, images)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:  # DALI's, for whatever it cannot decode
            self._pipeline = None
            if any(word in str(error) for word in NO_SAMPLE):
                raise
            return False
        return True

    def _aside(self) -> contextlib.AbstractContextManager[Any]:
        """Work on a stream of the loader's own; on a CPU as usual."""
        if not self.gpu:
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream()
        return torch.cuda.stream(self._stream)

    def _define(self, device: int | None) -> Any:
        """The pipeline, not yet built."""
        samples = self.batch_size * self.options.num_views * self.samples_per_clip
        pipeline = _dali("pipeline").Pipeline(
            samples, self.num_workers, device, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False
        )
        with pipeline:
            pipeline.set_outputs(self._outputs())
        return pipeline

    def _form(self) -> Any:
        types = _dali("types")
        return types.RGB if self.options.channels == 3 else types.GRAY


def _copy(output: Any, images: Tensor) -> None:
    """DALI's output, uint8 [n, …, H, W, C], into `images`: the next run uses its memory anew."""
    tensor = output.as_tensor()
    if images.is_cuda:
        images.view(-1).copy_(torch.from_dlpack(tensor).view(-1))
        torch.cuda.current_stream().synchronize()
    else:
        images.view(-1).numpy()[:] = np.asarray(tensor).reshape(-1)


def _external(name: str, kind: str, ndim: int) -> Any:
    return _dali("fn").external_source(name=name, dtype=getattr(_dali("types"), kind), ndim=ndim)


class DaliFrames(DaliLoader):
    """Stored JPEG frames through `fn.decoders.image_slice`; with decoder dali_gpu by nvJPEG, batches on the GPU."""

    def __init__(self, path: Path, options: LoaderOptions) -> None:
        self.gpu = options.decoder == "dali_gpu"
        if self.gpu and not torch.cuda.is_available():
            raise UserError("decoder dali_gpu needs a GPU, but torch sees none; use decoder dali or turbojpeg")
        super().__init__(path, options)

    @property
    def samples_per_clip(self) -> int:
        return self.options.num_frames

    def _outputs(self) -> Any:
        fn, types = _dali("fn"), _dali("types")
        images = fn.decoders.image_slice(
            _external("jpeg", "UINT8", 1),
            start=_external("corner", "INT32", 1),
            shape=_external("box", "INT32", 1),
            axes=(0, 1),
            device="mixed" if self.gpu else "cpu",
            output_type=self._form(),
            use_fast_idct=False,
        )
        images = fn.resize(images, size=self.options.image_size, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(images, horizontal=_external("flip", "INT32", 0))

    def _sound(self, ids: Array, crops: Array) -> bool:
        """Whether the headers of these clips' frames are whole and say what the set says.

        DALI's image decoder gives up at a header that is not, while its threads go on with the other frames, whose
        memory it has freed: the process then dies of a segmentation fault. Of a damaged scan it says so, and lives.
        """
        sizes = map(tuple, self._sizes(ids).tolist())
        return all(
            whole_header(self.data.jpeg(frame)[:HEADER].tobytes()) == size
            for size, frames in zip(sizes, self._frames(ids, crops).tolist(), strict=True)
            for frame in frames
        )

    def _inputs(self, ids: Array, crops: Array) -> dict[str, Any]:
        frames = self._frames(ids, crops)
        rows = np.repeat(crops.astype(np.int32), frames.shape[1], 0)
        jpegs = [self.data.jpeg(frame) for frame in frames.ravel().tolist()]
        return {"jpeg": jpegs, "corner": rows[:, :2].copy(), "box": rows[:, 2:4].copy(), "flip": rows[:, 4].copy()}


class DaliVideos(DaliLoader):
    """Video files through `fn.decoders.video`: NVDEC, or on a CPU the codecs that DALI has for it."""

    def __init__(self, path: Path, options: LoaderOptions) -> None:
        self.gpu = torch.cuda.is_available()
        super().__init__(path, options)
        if not self.data.videos["copied"].all():
            missing = int(self.data.videos["copied"].argmin())
            raise UserError(
                f"{self.data.name_of(missing)} has no video file in the set; prepare it again with --copy, or use "
                f"decoder dali or turbojpeg, which read the frames"
            )

    def _outputs(self) -> Any:
        fn, types = _dali("fn"), _dali("types")
        device = "mixed" if self.gpu else "cpu"
        clips = fn.decoders.video(_external("video", "UINT8", 1), frames=_external("frames", "INT32", 1), device=device)
        if self.options.channels == 1:
            clips = fn.color_space_conversion(clips, image_type=types.RGB, output_type=types.GRAY)
        clips = fn.resize(
            clips,
            size=self.options.image_size,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            roi_relative=True,
            roi_start=_external("start", "FLOAT", 1),
            roi_end=_external("end", "FLOAT", 1),
        )
        return fn.flip(clips, horizontal=_external("flip", "INT32", 0))

    def _inputs(self, ids: Array, crops: Array) -> dict[str, Any]:
        frames = self._frames(ids, crops) - self.data.videos["first"][ids][:, None]
        sizes, boxes = self._sizes(ids), crops[:, :5]
        return {
            "video": [self._file(int(video)) for video in ids],
            "frames": (frames * self.data.stride).astype(np.int32),
            "start": (boxes[:, :2] / sizes).astype(np.float32),
            "end": ((boxes[:, :2] + boxes[:, 2:4]) / sizes).astype(np.float32),
            "flip": boxes[:, 4].astype(np.int32),
        }

    def _file(self, video: int) -> Array:
        path = copied_file(self.data, video)
        codec = self.data.row(video)["codec"] if path.suffix != ".mp4" else "h264"
        if not self.gpu and codec not in CPU_CODECS:
            raise UserError(
                f"{path} is {codec}, and DALI's CPU decoder takes {', '.join(CPU_CODECS)} only; use decoder dali or "
                f"turbojpeg, which read the JPEG frames that python -m data_prep.videos stores"
            )
        with contextlib.suppress(OSError):
            return np.fromfile(path, np.uint8)
        return np.zeros(1, np.uint8)
