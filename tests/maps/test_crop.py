"""Maps cropped with their images."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasthpm.data.sampling import random_crops
from fasthpm.maps import crop as maps_crop
from tests.helpers import reference
from tests.helpers.array_sets import turned


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    cells=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_maps_are_cropped_as_the_plain_loops_say(seed: int, cells: tuple[int, int], grid: tuple[int, int]) -> None:
    """At random crops of images of random sizes, and at the whole image."""
    numbers = np.random.default_rng(seed)
    sizes = numbers.integers(1, 90, (4, 2))
    crops = random_crops(seed, 0, np.arange(4), sizes, 0.1, True)
    crops[3] = (0, 0, *sizes[3], seed % 2)
    values = torch.from_numpy(numbers.random((4, *cells))).half()
    tables = torch.from_numpy(crops), torch.from_numpy(sizes)
    got = maps_crop.crop_maps(values, *tables, grid)
    released = maps_crop.crop_maps(values, *tables, grid, crop="reference", patch_size=3)
    assert got.dtype == torch.float32
    for i in range(4):
        arguments = values[i].tolist(), tuple(crops[i].tolist()), tuple(sizes[i].tolist()), *grid
        np.testing.assert_allclose(got[i], reference.crop_map(*arguments), atol=1e-6)
        np.testing.assert_allclose(released[i], reference.released_crop_map(*arguments, 3), atol=1e-6)


def test_the_whole_image_gives_the_map_itself() -> None:
    values = torch.rand(2, 5, 5).half()
    sizes = torch.tensor([[50, 37], [8, 9]])
    crops = torch.cat([torch.zeros(2, 2).long(), sizes, torch.tensor([[0], [1]])], 1)
    got = maps_crop.crop_maps(values, crops, sizes, (5, 5)).reshape(2, 5, 5)
    torch.testing.assert_close(got[0], values[0].float())
    torch.testing.assert_close(got[1], values[1].float().flip(1))


def test_the_map_stays_on_its_object() -> None:
    """A bright cell and a bright spot of the image end in the same patch after the loader's own crop and flip."""
    image = np.zeros((32, 32, 1), np.uint8)
    image[20:24, 8:12] = 255
    from fasthpm.data.pixels import render

    values = torch.zeros(1, 8, 8)
    values[0, 5, 2] = 1
    for crop in ((12, 4, 16, 16, 0), (12, 4, 16, 16, 1), (16, 0, 16, 16, 1), (8, 8, 20, 20, 0)):
        pixels = render(image, np.array(crop), (32, 32), "area", np.ones(3))
        bright = pixels.reshape(8, 4, 8, 4).mean((1, 3)).argmax()
        got = maps_crop.crop_maps(values, torch.tensor([crop]), torch.tensor([[32, 32]]), (8, 8))
        assert abs(int(got.argmax()) // 8 - bright // 8) <= 1
        assert abs(int(got.argmax()) % 8 - bright % 8) <= 1


def test_maps_are_turned_as_their_crops_are() -> None:
    maps = torch.rand(8, 6, 6, generator=torch.Generator().manual_seed(0))
    crops = torch.tensor([[3, 5, 20, 24, code] for code in range(8)])
    sizes = torch.full((8, 2), 40)
    upright = maps_crop.crop_maps(maps, crops * torch.tensor([1, 1, 1, 1, 0]), sizes, (4, 4)).reshape(8, 4, 4)
    found = maps_crop.crop_maps(maps, crops, sizes, (4, 4)).reshape(8, 4, 4)
    for code in range(8):
        assert torch.equal(
            found[code], torch.from_numpy(turned(upright[code, :, :, None].numpy(), code)[..., 0].copy())
        )
