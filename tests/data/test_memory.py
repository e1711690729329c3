"""Memory of batches: used again once it is free, never before."""

import gc

import torch

from fasthpm.data.memory import Recycled

SHAPE = (2, 4, 4, 3)


def test_memory_that_nobody_holds_is_handed_out_again() -> None:
    memory = Recycled(2)
    address = memory.empty(SHAPE, torch.uint8).data_ptr()
    assert memory.empty(SHAPE, torch.uint8).data_ptr() == address


def test_a_view_of_any_kind_keeps_memory() -> None:
    memory = Recycled(4)
    for look in (
        lambda t: t,
        lambda t: t[1:],
        lambda t: t.view(-1)[3],
        lambda t: t.numpy(),
        lambda t: t.numpy()[0, 1],
        lambda t: t.detach(),
        lambda t: t.untyped_storage(),
        lambda t: torch.utils.data.default_convert({"images": t}),
    ):
        tensor = memory.empty(SHAPE, torch.uint8)
        held, place = look(tensor), tensor.data_ptr()
        del tensor
        others = [memory.empty(SHAPE, torch.uint8) for _ in range(6)]
        assert place not in {other.data_ptr() for other in others}, held
        assert len({other.data_ptr() for other in others}) == len(others)


def test_other_shapes_and_types_have_memory_of_their_own() -> None:
    memory = Recycled(4)
    address = memory.empty(SHAPE, torch.uint8).data_ptr()
    wider = memory.empty(SHAPE, torch.uint16)
    assert wider.data_ptr() != address
    assert wider.dtype == torch.uint16
    assert wider.shape == SHAPE
    assert memory.empty((1, *SHAPE[1:]), torch.uint8).data_ptr() != address
    assert memory.empty(SHAPE, torch.uint8).data_ptr() == address


def test_what_is_dropped_beyond_the_kept_ones_is_the_systems() -> None:
    memory = Recycled(2)
    held = [memory.empty(SHAPE, torch.float32) for _ in range(5)]
    places = {tensor.data_ptr() for tensor in held}
    assert len(places) == 5
    last = {tensor.data_ptr() for tensor in held[-2:]}
    held.clear()
    gc.collect()
    again = [memory.empty(SHAPE, torch.float32) for _ in range(2)]
    assert {tensor.data_ptr() for tensor in again} == last
    memory.clear()
    assert all(int(tensor.numel()) == 96 for tensor in again)  # still theirs
