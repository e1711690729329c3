"""The loaders that `bench.loader` compares, each in a process of its own, so that none meets another's threads."""

import importlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bench.common import cpu_seconds
from fasthpm.data import Loader, build_loader

SIDE, CROP_MIN = 224, 0.2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Spec:
    """A loader to be measured, an epoch at a time: what was decoded ahead of a loop that stops would count wrongly."""

    name: str
    kind: str  # a key of KINDS, or module:function
    data: str  # folder, .beton or synthetic:N
    workers: int  # processes or threads
    batch_size: int
    interpolation: str = "area"


@dataclass(frozen=True)
class Taken:
    """One measurement."""

    images: int
    seconds: float
    cpu_seconds: float


def our_loader(spec: Spec) -> Loader:
    """This project's loader of `spec`."""
    return build_loader(
        spec.data,
        batch_size=spec.batch_size,
        image_size=(SIDE, SIDE),
        channels=3,
        num_workers=spec.workers,
        crop_min=CROP_MIN,
        interpolation=spec.interpolation,
    )


# -------------------------------------------------------------------------------------------------- one kind each
def ours(spec: Spec) -> Callable[[int], int]:
    """Seeded crops with their boxes, uint8."""
    loader = our_loader(spec)

    def run(number: int) -> int:
        loader.set_epoch(number)
        return epoch(loader, spec)

    return run


def torchvision_mae(spec: Spec) -> Callable[[int], int]:
    """MAE's transforms: PIL, bicubic, float32, normalised."""
    from torchvision import transforms

    return _torchvision(spec, [transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def torchvision_uint8(spec: Spec) -> Callable[[int], int]:
    """The same, but uint8 as ours: what remains to be normalised on the device."""
    from torchvision import transforms

    return _torchvision(spec, [transforms.PILToTensor()])


def _torchvision(spec: Spec, last: list[Any]) -> Callable[[int], int]:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    crop = transforms.RandomResizedCrop(SIDE, scale=(CROP_MIN, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *last])
    return torch_epochs(ImageFolder(spec.data, transform), spec)


def torch_epochs(samples: Any, spec: Spec) -> Callable[[int], int]:
    """Epochs over a `Dataset` by torch's own loader."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        samples, spec.batch_size, shuffle=True, num_workers=spec.workers, drop_last=True, persistent_workers=True
    )
    return lambda number: epoch(loader, spec)


def ffcv_loader(spec: Spec) -> Any:
    """FFCV's own `Loader` and decoder: unseeded crops, no boxes, uint8."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    decoder = RandomResizedCropRGBImageDecoder((SIDE, SIDE), scale=(CROP_MIN, 1.0))
    return FfcvLoader(
        spec.data,
        batch_size=spec.batch_size,
        num_workers=spec.workers,
        order=OrderOption.RANDOM,
        seed=0,
        os_cache=True,
        drop_last=True,
        pipelines={"image": [decoder, RandomHorizontalFlip(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
    )


def ffcv_own(spec: Spec) -> Callable[[int], int]:
    """FFCV's own loader."""
    loader = ffcv_loader(spec)
    return lambda number: epoch(loader, spec)


KINDS: dict[str, Callable[[Spec], Callable[[int], int]]] = {
    function.__name__: function for function in (ours, torchvision_mae, torchvision_uint8, ffcv_own)
}


def epoch(loader: Any, spec: Spec) -> int:
    """Take a whole epoch; returns the images in it. Every loader leaves out a batch that is not full."""
    return sum(spec.batch_size for _ in loader)


def _kind(name: str) -> Callable[[Spec], Callable[[int], int]]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function) if function else KINDS[name]


# -------------------------------------------------------------------------------------------------- processes
def serve(connection: Connection, spec: Spec) -> None:
    """Body of a variant's process: measure whenever asked, until asked to stop."""
    try:
        run = _kind(spec.kind)(spec)
        while (number := connection.recv()) is not None:
            begin, cpu_begin = time.perf_counter(), cpu_seconds()
            images = run(number)
            connection.send(Taken(images, time.perf_counter() - begin, cpu_seconds() - cpu_begin))
    except EOFError:
        pass
    except BaseException:
        connection.send(traceback.format_exc())


class Variant:
    """A `Spec` with its process."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, spec), name=spec.name)
        self._process.start()
        theirs.close()

    def measure(self, number: int) -> Taken:
        """One measurement. **Raises:** `RuntimeError` with the process's traceback if it failed."""
        try:
            self._connection.send(number)
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            answer = f"its process ended with status {self._process.exitcode}"
        if not isinstance(answer, Taken):
            raise RuntimeError(f"{self.spec.name}: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._connection.send(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def started(specs: list[Spec]) -> Iterator[list[Variant]]:
    """A process for each spec, ended at the end."""
    variants: list[Variant] = []
    try:
        for spec in specs:
            variants.append(Variant(spec))
        yield variants
    finally:
        for variant in variants:
            variant.close()
