"""A map cropped, flipped and resized with its image."""

import torch
from torch import Tensor

from fasthpm.data.sampling import HORIZONTAL, TRANSPOSED, VERTICAL

REFERENCE_CELLS = (2, 3)  # rows or columns that the released code reads: crop inside the image, or up to its border


# ------------------------------------------------------------------------------------------------------ crop
def crop_maps(
    maps: Tensor, crops: Tensor, sizes: Tensor, grid: tuple[int, int], *, crop: str = "image", patch_size: int = 16
) -> Tensor:
    """Cut, resize and flip maps as their images were: one value for every patch of the crop.

    - `maps`: [B, R, C], cell (i, j) standing for that part of the whole stored image
    - `crops`: int64 [B, 5]: top, left, height, width, which way up (`sampling.turned`)
    - `sizes`: int64 [B, 2]: height, width, as in `Batch`
    - `grid`: (r, c) patches of the crop
    - `crop`: "image": the map at every patch's centre, bilinear between the centres of cells, constant beyond the
      outermost; "reference": what AMT's released code reads whatever the crop is: the top left 2 x 2 cells (a third row
      or column where the crop ends at the image's border), enlarged to the training crop and averaged over each patch
      of `patch_size` pixels

    **Returns:** float32 [B, r*c]. No host synchronisation.
    """
    weights = _centres if crop == "image" else _released
    down = weights(crops[:, 0], crops[:, 2], sizes[:, 0], grid[0], maps.shape[1], patch_size)
    across = weights(crops[:, 1], crops[:, 3], sizes[:, 1], grid[1], maps.shape[2], patch_size)
    values = down @ maps.to(torch.float64) @ across.transpose(1, 2)
    code = crops[:, 4, None, None]
    if grid[0] == grid[1]:  # else no crop is turned by 90 degrees
        values = torch.where((code & TRANSPOSED).bool(), values.transpose(1, 2), values)
    values = torch.where((code & HORIZONTAL).bool(), values.flip(2), values)
    return torch.where((code & VERTICAL).bool(), values.flip(1), values).flatten(1).float()


def _centres(start: Tensor, length: Tensor, size: Tensor, patches: int, cells: int, patch_size: int) -> Tensor:
    """Bilinear weights along one axis: float64 [B, patches, cells]."""
    middle = (torch.arange(patches, dtype=torch.float64, device=start.device) + 0.5) / patches
    place = (start[:, None] + length[:, None] * middle) / size[:, None] * cells - 0.5
    index = torch.arange(cells, dtype=torch.float64, device=start.device)
    return (1 - (place.clamp(0, cells - 1)[:, :, None] - index).abs()).clamp_min(0)


def _released(start: Tensor, length: Tensor, size: Tensor, patches: int, cells: int, patch_size: int) -> Tensor:
    """What the released code's enlargement and sum per patch come to along one axis: float64 [B, patches, cells]."""
    ends = (start + length == size)[:, None, None]
    few, more = (_enlarged(count, patches, cells, patch_size).to(start.device) for count in REFERENCE_CELLS)
    return torch.where(ends, more, few)


def _enlarged(count: int, patches: int, cells: int, patch_size: int) -> Tensor:
    """Weights of the first `count` of `cells` cells, enlarged bilinearly to all pixels, averaged per patch."""
    count = min(count, cells)
    pixels = patches * patch_size
    place = ((torch.arange(pixels, dtype=torch.float64) + 0.5) * count / pixels - 0.5).clamp(0, count - 1)
    weights = (1 - (place[:, None] - torch.arange(cells, dtype=torch.float64)).abs()).clamp_min(0)
    return weights.reshape(patches, patch_size, cells).mean(dim=1)
