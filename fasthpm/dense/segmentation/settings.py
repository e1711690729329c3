"""What can be set of a segmentation, and the published recipes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from fasthpm.dense.pairs import PairFiles
from fasthpm.dense.settings import Dense
from fasthpm.errors import UserError
from fasthpm.options import OURS, RELEASED, option

SMALL_SIDE = 128  # pixels of a run's images: up to here --recipe auto means small
STRIDE = 2 / 3  # of a crop, from one window to the next: 341 of 512


@dataclass(frozen=True, kw_only=True)
class Segment(Dense, PairFiles):
    """One training of UPerNet. Defaults are mmseg's for MAE's ViT-B on ADE20K; recipes have the others."""

    TESTS: ClassVar[frozenset[str]] = Dense.TESTS | {
        *("val_images", "val_masks", "classes", "ignore_index", "background"),
        *("short_side", "stride", "whole"),
    }
    PLACES: ClassVar[tuple[str, ...]] = ("data_path", "train_images", "train_masks", "val_images", "val_masks")

    # model
    head_width: int = option(768, "channels of UPerNet's head", low=1, origin=RELEASED)
    relative_positions: bool = option(
        False, "add a bias per block and pair of places, from zero, as mmseg does (square input_size)", origin=OURS
    )
    layer_scale: float = option(
        0.0, "add a factor per block and channel that starts so (mmseg: 1.0); 0 = none", low=0, origin=OURS
    )
    # augmentation
    short_side: int = option(
        0,
        "images are resized so that their shorter side is this, the longer one at most 4 times; 0 = that of the crop",
        low=0,
        origin=RELEASED,
    )
    resize_min: float = option(0.5, "smallest random factor of that size", above=0, origin=RELEASED)
    resize_max: float = option(2.0, "largest", above=0, origin=RELEASED)
    cat_max_ratio: float = option(
        0.75, "share of a crop's labelled pixels that one class may have, in 10 tries", above=0, high=1, origin=RELEASED
    )
    flip: bool = option(True, "mirror half of the images", origin=RELEASED)
    distort: bool = option(True, "change brightness, contrast, saturation and hue at random", origin=RELEASED)
    # test
    stride: int = option(
        0, "pixels from one window of a test to the next; 0 = two thirds of a crop", low=0, run_only=True
    )
    whole: bool = option(False, "test whole images at a time, with interpolated positions", run_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize_min > self.resize_max:
            raise UserError(
                f"resize_min is {self.resize_min:g}, expected at most resize_max {self.resize_max:g}; lower it"
            )
        if self.stride > min(self.image_size):
            raise UserError(
                f"stride is {self.stride}, expected at most the crop's side {min(self.image_size)}: pixels between two "
                f"windows would never be tested"
            )

    @property
    def test_side(self) -> int:
        """Shorter side of images at factor 1."""
        return self.short_side or min(self.image_size)

    @property
    def strides(self) -> tuple[int, int] | None:
        """From one window to the next, down and across; None = whole images."""
        height, width = self.image_size
        if self.whole:
            return None
        return (self.stride or max(int(height * STRIDE), 1), self.stride or max(int(width * STRIDE), 1))


# -------------------------------------------------------------------------------------------------- recipes
def upernet_vit_base_ade20k_160k() -> Segment:
    """UPerNet, ViT-B/16, ADE20K, 160,000 updates of 16 crops of 512.

    deepspeed --module fasthpm.dense.segmentation RUN --recipe upernet_vit_base_ade20k_160k --data_path ADE20K

    Paper: HPM, 800 epochs: mIoU 48.5. MAE, 1600 epochs, by mmseg: 48.13. Ours: not yet run.

    [paper] lr 1e-4, weight decay 0.05, batch 16, crops of 512, 160,000 updates. [released code] (mmseg's configs/mae)
    resize to (2048, 512) times 0.5 to 2, cat_max_ratio 0.75, mirrors, photometric distortion; head of 768 channels,
    dropout 0.1, FCN head on the third level with weight 0.4; layer decay 0.65, drop path 0.1, 1,500 updates of warm-up
    from 1e-6, poly down to 0; windows of 512 every 341 pixels. Norms over the images of all devices (mmseg: 8 x 2), so
    that `--batch_size` times devices matters: 16 is the protocol's. [ours] no relative positions and no LayerScale,
    which mmseg adds (--relative_positions --layer_scale 1.0); no weight decay on positions; bfloat16 (mmseg: fp16).
    """
    return Segment()


def upernet_vit_base_ade20k_80k() -> Segment:
    """UPerNet, ViT-B/16, ADE20K, 80,000 updates: the paper's ablations.

    Paper: HPM, 200 epochs: mIoU 42.09 (pixels; MAE 40.49, with the loss predictor alone 41.45), 47.35 (CLIP's features;
    46.59, 46.97). Ours: not yet run.

    [paper] 80,000 updates. The rest as in upernet_vit_base_ade20k_160k.
    """
    return replace(upernet_vit_base_ade20k_160k(), steps=80_000)


def upernet_vit_large_ade20k_160k() -> Segment:
    """UPerNet, ViT-L/16, ADE20K, 160,000 updates.

    Paper: HPM, 800 epochs: mIoU 54.6. Ours: not yet run.

    [paper] lr 2e-5. [released code] a head of 1,024 channels, as wide as the encoder (mmseg's BEiT). [ours] drop path
    0.1 and layer decay 0.65 as for ViT-B: the paper has no word on them. The rest as in upernet_vit_base_ade20k_160k.
    """
    return replace(upernet_vit_base_ade20k_160k(), lr=2e-5, head_width=1024)


def upernet_vit_large_ade20k_80k() -> Segment:
    """UPerNet, ViT-L/16, ADE20K, 80,000 updates.

    Paper: number not at hand. Ours: not yet run.

    [paper] 80,000 updates. The rest as in upernet_vit_large_ade20k_160k.
    """
    return replace(upernet_vit_large_ade20k_160k(), steps=80_000)


def upernet_small() -> Segment:
    """UPerNet for small images (up to 128 pixels) and small encoders: minutes on two CPU cores. No paper; ours: see
    docs/dense.md.

    [ours] crops of 96, a head of 32 channels, 600 updates of 8, lr 3e-3, layer decay 0.75, no drop path, factors 0.75
    to 1.5, colours as they are.
    """
    return Segment(
        input_size="96",
        head_width=32,
        steps=600,
        warmup_steps=60,
        batch_size=8,
        global_batch_size=8,
        lr=3e-3,
        layer_decay=0.75,
        drop_path=0.0,
        resize_min=0.75,
        resize_max=1.5,
        distort=False,
        log_every=20,
        eval_every=0,
        save_every=200,
    )


SMALL = "upernet_small"
RECIPES: dict[str, Callable[[], Segment]] = {
    recipe.__name__: recipe
    for recipe in (
        upernet_vit_base_ade20k_160k,
        upernet_vit_base_ade20k_80k,
        upernet_vit_large_ade20k_160k,
        upernet_vit_large_ade20k_80k,
        upernet_small,
    )
}
