"""Clips through DALI: the same as without it."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fasthpm.errors import UserError
from tests.helpers.video_sets import loader_of


def test_a_missing_dali_is_one_line(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    with pytest.raises(UserError, match=r"needs nvidia-dali-cuda130 .* pip install 'fasthpm\[video\]'"):
        loader_of(prepared, decoder="dali")
    assert loader_of(prepared).info.num_samples == 6


def test_dalis_video_decoder_gives_the_same_clips(with_copies: tuple[Path, Path, Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the test with NVDEC takes this one's place")
    kept, encoded, _ = with_copies
    video, jpeg = loader_of(kept, decoder="dali_video", batch_size=2), loader_of(kept, batch_size=2)
    for a, b in zip(video, jpeg, strict=True):
        assert torch.equal(a.crops, b.crops)
        assert (a.images.float() - b.images.float()).abs().mean() < 8  # other chroma and JPEG of quality 90
        shuffled = (a.images.float() - b.images.flip(1).float()).abs().mean()
        assert (a.images.float() - b.images.float()).abs().mean() < shuffled
    video.close()
    jpeg.close()
    with pytest.raises(
        UserError, match=r"is h264, and DALI's CPU decoder takes mjpeg, vp8, vp9 only; use decoder dali"
    ):
        list(loader_of(encoded, decoder="dali_video", batch_size=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nvJPEG and NVDEC need a GPU")
@pytest.mark.parametrize("decoder", ["dali_gpu", "dali_video"])
def test_gpu_decoders_give_the_same_clips_on_the_gpu(with_copies: tuple[Path, Path, Path], decoder: str) -> None:
    _, encoded, _ = with_copies
    on_gpu, on_cpu = loader_of(encoded, decoder=decoder, batch_size=2), loader_of(encoded, batch_size=2)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.images.is_cuda
        assert (a.images.cpu().float() - b.images.float()).abs().mean() < 8
    on_gpu.close()
    on_cpu.close()


def test_gpu_pipelines_are_refused_without_a_gpu_and_defined_for_one(
    prepared: Path, with_copies: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the test above runs these pipelines")
    from nvidia.dali.pipeline import Pipeline

    with pytest.raises(UserError, match="decoder dali_gpu needs a GPU, but torch sees none"):
        loader_of(prepared, decoder="dali_gpu")
    with pytest.raises(UserError, match="no video file in the set; prepare it again with --copy"):
        loader_of(prepared, decoder="dali_video")
    for kind, decoder in (("prepared", "dali"), ("copies", "dali_video")):
        loader = loader_of(prepared if kind == "prepared" else with_copies[0], decoder=decoder, batch_size=2)
        for gpu, device in ((False, "cpu"), (True, "gpu")):
            monkeypatch.setattr(loader, "gpu", gpu)
            with Pipeline(2, 1, 0):
                assert loader._outputs().device == device
            assert loader._define(0).max_batch_size == 2 * (3 if decoder == "dali" else 1)
        loader.close()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (torch.AcceleratorError("device-side assert"), True),
        (RuntimeError("Critical error in pipeline: CUDA allocation failed: out of memory"), True),
        (RuntimeError("Error in CPU operator `decoders.image`: cannot parse the JPEG"), False),
    ],
)
def test_memory_that_runs_out_is_no_sample_s_fault(
    error: RuntimeError, raised: bool, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasthpm.data.video import dali

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(dali, "_copy", fails)
    loader = loader_of(prepared, decoder="dali", batch_size=2, max_bad_samples=1.0)
    try:
        with pytest.raises(type(error) if raised else UserError, match=str(error) if raised else "does not decode"):
            next(iter(loader))
        assert bool(loader.bad_samples()) is not raised
    finally:
        loader.close()


class FakeGPU:
    """A fake of the torch that `dali` uses: no GPU, only a list of what is done on which stream."""

    OutOfMemoryError, AcceleratorError = torch.OutOfMemoryError, torch.AcceleratorError
    uint8 = torch.uint8

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.now = "training"
        self.cuda = SimpleNamespace(
            Stream=lambda: "aside",
            stream=self._entered,
            current_stream=lambda: SimpleNamespace(name=self.now, synchronize=lambda: self._note("synchronize")),
        )

    @contextlib.contextmanager
    def _entered(self, stream: str) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def _note(self, what: str, stream: str = "") -> None:
        self.done.append((what, stream or self.now))

    def empty(self, shape: Any, dtype: Any, device: str) -> Any:
        self._note("allocate")
        flat = SimpleNamespace(copy_=lambda other: self._note("copy"))
        return SimpleNamespace(
            is_cuda=True, view=lambda _: flat, record_stream=lambda stream: self._note("used by", stream.name)
        )

    def from_dlpack(self, output: Any) -> Any:
        self._note("take over")
        return SimpleNamespace(view=lambda _: None)


def test_clips_are_copied_on_a_stream_of_their_own(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each batch waits for the step that training has queued; the memory stays training's until that is over."""
    from fasthpm.data.video import dali

    loader, fake = loader_of(prepared, decoder="dali", batch_size=2), FakeGPU()
    monkeypatch.setattr(dali, "torch", fake)
    monkeypatch.setattr(loader, "gpu", True)
    output = SimpleNamespace(as_tensor=lambda: None)
    loader._pipeline = SimpleNamespace(feed_input=lambda name, values: None, run=lambda: (output,))
    images = loader._empty(2)
    ids = np.arange(2)
    crops = loader._crops(0, ids, loader._sizes(ids), ids)
    assert loader._run(images, ids, crops)
    assert fake.done == [
        ("allocate", "aside"),
        ("used by", "training"),
        ("take over", "aside"),
        ("copy", "aside"),
        ("synchronize", "aside"),
    ]
    assert fake.now == "training"
    loader.close()
