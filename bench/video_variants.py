"""Clips as VideoMAE reads them: decord or torchcodec on the original files, multi-scale crop, flip, normalised.

Written from what its loader does: every sample opens its file, takes 16 frames 4 apart from a random place, cuts and
resizes each frame by PIL (bilinear), flips, stacks and normalises to float32, in torch's DataLoader with workers.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bench.variants import MEAN, SIDE, STD, Spec, epoch, torch_epochs
from fasthpm.data import build_loader
from fasthpm.data.video.sampling import multi_scale_crops

NUM_FRAMES, RATE = 16, 4


class VideoFiles(Dataset[Tensor]):
    """Clips of video files: float32 [3, T, H, W], or uint8 [T, H, W, 3] where `normalised` is not asked for."""

    def __init__(self, folder: str, read: Callable[[str], Any], normalised: bool) -> None:
        self.paths = [str(path) for path in sorted(Path(folder).rglob("*.mp4"))]
        self.read, self.normalised = read, normalised

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        frames = self.read(self.paths[index])
        size = np.array([frames.shape[1:3]])
        top, left, height, width, flipped = multi_scale_crops(
            random.getrandbits(30), 0, np.array([index]), size, (SIDE, SIDE), True
        )[0].tolist()
        box = (left, top, left + width, top + height)
        pictures = [
            Image.fromarray(frame).crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for frame in frames
        ]
        clip = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        clip = clip.flip(2) if flipped else clip
        if not self.normalised:
            return clip
        scaled = clip.permute(3, 0, 1, 2).float().div(255)
        return (scaled - torch.tensor(MEAN)[:, None, None, None]) / torch.tensor(STD)[:, None, None, None]


def _chosen(count: int) -> list[int]:
    start = random.randrange(max(count - NUM_FRAMES * RATE + 1, 1))
    return [min(start + RATE * k, count - 1) for k in range(NUM_FRAMES)]


def read_decord(path: str) -> Any:
    """uint8 [T, h, w, 3]."""
    from decord import VideoReader, cpu

    reader = VideoReader(path, num_threads=1, ctx=cpu(0))
    return reader.get_batch(_chosen(len(reader))).asnumpy()


def read_torchcodec(path: str) -> Any:
    """uint8 [T, h, w, 3]."""
    from torchcodec.decoders import VideoDecoder

    decoder: Any = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    return decoder.get_frames_at(_chosen(len(decoder))).data.numpy()


def videomae_decord(spec: Spec) -> Callable[[int], int]:
    """VideoMAE's own way."""
    return torch_epochs(VideoFiles(spec.data, read_decord, True), spec)


def decord_uint8(spec: Spec) -> Callable[[int], int]:
    """The same, not normalised."""
    return torch_epochs(VideoFiles(spec.data, read_decord, False), spec)


def torchcodec_uint8(spec: Spec) -> Callable[[int], int]:
    """torchcodec in decord's place, not normalised."""
    return torch_epochs(VideoFiles(spec.data, read_torchcodec, False), spec)


def _ours(spec: Spec, decoder: str) -> Callable[[int], int]:
    loader = build_loader(
        spec.data,
        batch_size=spec.batch_size,
        image_size=(SIDE, SIDE),
        channels=3,
        num_workers=spec.workers,
        num_frames=NUM_FRAMES,
        sampling_rate=RATE,
        decoder=decoder,
    )

    def run(number: int) -> int:
        loader.set_epoch(number)
        return epoch(loader, spec)

    return run


def ours_turbojpeg(spec: Spec) -> Callable[[int], int]:
    """The prepared set through libturbojpeg and our kernel."""
    return _ours(spec, "turbojpeg")


def ours_dali(spec: Spec) -> Callable[[int], int]:
    """The prepared set through DALI's image decoder on the CPU."""
    return _ours(spec, "dali")
