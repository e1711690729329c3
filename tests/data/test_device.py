"""The batch that is asked for while the one before it is worked on."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fasthpm.data import build_loader
from fasthpm.data.device import DeviceLoader, on_device
from tests.helpers.loaders import SIZE, same


def test_the_next_batch_is_asked_for_while_the_consumer_works(sources: dict[str, str]) -> None:
    """Exactly one: the second batch is under way when the first is given, the third is not."""
    inner = build_loader(sources["ffcv"], batch_size=4, image_size=SIZE, channels=3)
    asked = [threading.Event() for _ in range(len(inner))]
    given = type(inner)._given

    def note(epoch, batch):
        given(inner, epoch, batch)
        asked[batch].set()

    inner._given = note
    loader = DeviceLoader(inner, torch.device("cpu"))
    iterator = iter(loader)
    next(iterator)
    assert asked[1].wait(10)
    assert not asked[2].wait(0.2)
    assert inner.state_dict() == {"epoch": 0, "batch": 2}
    assert loader.state_dict() == {"epoch": 0, "batch": 1}
    next(iterator)
    assert asked[2].wait(10)
    again = next(iter(loader))  # the third, though it was asked for before
    loader.close()
    assert same(again, list(build_loader(sources["ffcv"], batch_size=4, image_size=SIZE, channels=3))[2])


def test_an_error_ahead_comes_after_the_batch_before_it(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = build_loader(sources["ffcv"], batch_size=4, image_size=SIZE, channels=3)
    make = inner._make
    monkeypatch.setattr(inner, "_make", lambda e, b: make(e, b) if b < 2 else (_ for _ in ()).throw(OSError("disk")))
    loader = DeviceLoader(inner, torch.device("cpu"))
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert loader.state_dict() == {"epoch": 0, "batch": 2}
    with pytest.raises(OSError, match="disk"):
        next(iterator)
    loader.close()


def test_on_a_cpu_the_loader_is_left_as_it_is(make: Callable[..., Any]) -> None:
    loader = make()
    assert on_device(loader, torch.device("cpu")) is loader
