"""What can be set of a detection, and the published recipes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from fasthpm.dense.settings import Dense
from fasthpm.errors import UserError
from fasthpm.options import OURS, RELEASED, option

SMALL_SIDE = 128  # pixels of a run's images: up to here --recipe auto means small
LIMITS = {"softmax": (0.05, 100), "federated": (0.02, 300)}  # least score, most detections of an image
HEADS = ("vitdet", "small")
COCO_IMAGES = 118_000  # as ViTDet counts an epoch


@dataclass(frozen=True, kw_only=True)
class Detect(Dense):
    """One training of Mask R-CNN. The defaults are a base; recipes say the rest."""

    TESTS: ClassVar[frozenset[str]] = Dense.TESTS | {"val_json", "val_images", "score", "detections"}
    PLACES: ClassVar[tuple[str, ...]] = ("data_path", "train_json", "train_images", "val_json", "val_images")

    # data
    data_path: str = option(
        "",
        "folder with {train,val}.json and {train,val}/images/, or COCO's annotations/ and {train,val}2017/, or LVIS's",
    )
    train_json: str = option("", "instead of data_path: file of COCO's form to train on", run_only=True)
    train_images: str = option("", "folder of its images", run_only=True)
    val_json: str = option("", "file to test on", run_only=True)
    val_images: str = option("", "folder of its images", run_only=True)
    keep_empty: bool = option(False, "train on images without an object too", origin=RELEASED)
    # model
    heads: str = option("vitdet", "vitdet: ViTDet's; small: a quarter of the channels", choices=HEADS, origin=RELEASED)
    window: int = option(14, "side of a window of attention, in patches; 0 = all global", low=0, origin=RELEASED)
    relative_positions: bool = option(
        True, "add relative positions to the attention, from zero", origin=f"{RELEASED}, ViTDet's"
    )
    activation_checkpointing: bool = option(
        False, "keep only the blocks' inputs and compute the rest again in the backward pass", run_only=True
    )
    # augmentation
    scale_min: float = option(0.1, "least random scale; 1 fits the whole image into a crop", above=0, origin=RELEASED)
    scale_max: float = option(2.0, "largest", above=0, origin=RELEASED)
    flip: bool = option(True, "mirror half of the images", origin=RELEASED)
    least_side: float = option(
        1.0, "objects with a shorter side in the crop, in pixels, are left out", low=0, origin=OURS
    )
    # long tails
    loss: str = option(
        "softmax", "of the classes; federated: LVIS's, with sigmoids", choices=tuple(LIMITS), origin=RELEASED
    )
    repeat_threshold: float = option(
        0.0, "images of classes rarer than this share come more often; 0 = never", low=0, below=1, origin=RELEASED
    )
    # test
    score: float = option(
        0.0,
        f"detections below this are left out; 0 = {LIMITS['softmax'][0]}, of a federated loss {LIMITS['federated'][0]}",
        low=0,
        below=1,
        origin=RELEASED,
        run_only=True,
    )
    detections: int = option(
        0,
        f"most detections of an image; 0 = {LIMITS['softmax'][1]}, of a federated loss {LIMITS['federated'][1]}",
        low=0,
        origin=RELEASED,
        run_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.image_size
        if height != width:
            raise UserError(f"input_size is {height}x{width}, and detection pads to squares; give one side")
        if self.scale_min > self.scale_max:
            raise UserError(f"scale_min is {self.scale_min:g}, expected at most scale_max {self.scale_max:g}; lower it")

    @property
    def side(self) -> int:
        """Of the square that the network sees."""
        return self.image_size[0]

    @property
    def limits(self) -> tuple[float, int]:
        """Least score and most detections of an image."""
        score, detections = LIMITS[self.loss]
        return self.score or score, self.detections or detections


# -------------------------------------------------------------------------------------------------- recipes
def maskrcnn_vit_base_coco_100e() -> Detect:
    """Mask R-CNN, ViT-B/16, COCO, 100 epochs: ViTDet's schedule.

    deepspeed --module fasthpm.dense.detection RUN --recipe maskrcnn_vit_base_coco_100e --data_path COCO

    Paper (ViTDet's, of MAE, 1600 epochs): box AP 51.6, mask AP 45.9. HPM gives none at this length. Ours: not yet run.

    [released code] (detectron2's projects/ViTDet) crops of 1024 by large-scale jitter 0.1 to 2, mirrors; windows of 14,
    blocks 2, 5, 8, 11 global, relative positions from zero, drop path 0.1; RPN of 2 convolutions, box head of 4 and a
    layer, mask head of 4, with norms; AdamW 1e-4 at batch 64, weight decay 0.1 (none on norms and positions), layer
    decay 0.7; 184,375 updates, 250 of warm-up from 0.001, a tenth at 8/9 and 26/27. [ours] no weight decay on biases
    (detectron2: on those but of norms); torchvision's smooth L1 for boxes (detectron2: L1); a crop's place drawn for
    both axes; masks cut by the nearest pixel; bfloat16 (detectron2: fp16).
    """
    return Detect(
        input_size="1024",
        steps=100 * COCO_IMAGES // 64,
        global_batch_size=64,
        lr=1e-4,
        warmup_steps=250,
        warmup_start=0.001,
        lr_schedule="steps",
        layer_decay=0.7,
        weight_decay=0.1,
        eval_every=18_437,
    )


def maskrcnn_vit_base_coco_12e() -> Detect:
    """Mask R-CNN, ViT-B/16, COCO, 12 epochs: the papers' short schedule.

    deepspeed --module fasthpm.dense.detection RUN --recipe maskrcnn_vit_base_coco_12e --data_path COCO

    Paper (TPAMI, Tab. VI): HPM, 200 epochs, pixels: box AP 42.03, mask AP 38.15 (MAE 40.45, 37.01; with the loss
    predictor alone 40.98, 37.34); of CLIP's features 46.57, 41.96 (46.21, 41.55; 46.43, 41.80). Ours: not yet run.

    [paper] 12 epochs, batch 16, crops of 1024: 88,500 updates. [ours] lr 4e-5: stated nowhere (linear scaling of
    ViTDet's gives 2.5e-5); a tenth at 8/9 and 26/27, as ViTDet. The rest as in maskrcnn_vit_base_coco_100e.
    """
    return replace(
        maskrcnn_vit_base_coco_100e(), steps=12 * COCO_IMAGES // 16, global_batch_size=16, lr=4e-5, eval_every=22_125
    )


def maskrcnn_vit_base_lvis() -> Detect:
    """Mask R-CNN, ViT-B/16, LVIS v1, 1,203 classes: ViTDet's schedule.

    deepspeed --module fasthpm.dense.detection RUN --recipe maskrcnn_vit_base_lvis --data_path LVIS

    Paper (AMT's, 400 epochs, 75,000 updates): from scratch 14.6 box AP, 14.3 mask AP; MAE 25.0, 24.2; AMT 26.9, 26.0.
    HPM's: not at hand. Ours: not yet run.

    [released code] (detectron2's projects/ViTDet) repeat-factor sampling at 0.001; sigmoids, federated loss of 50
    classes; detections from 0.02, 300 of an image; lr 2e-4 at batch 64, 156,250 updates. The rest as in
    maskrcnn_vit_base_coco_100e.
    """
    return replace(
        maskrcnn_vit_base_coco_100e(),
        steps=156_250,
        lr=2e-4,
        loss="federated",
        repeat_threshold=0.001,
        eval_every=31_250,
    )


def maskrcnn_small() -> Detect:
    """Mask R-CNN for small images (up to 128 pixels) and small encoders: minutes on two CPU cores.

    No paper; ours: see docs/dense.md.

    [ours] crops of 96 by jitter 0.5 to 1.5, heads of 64 channels and 32 regions an image, 300 updates of 16, lr 2e-3, a
    tenth at 0.8 of them, layer decay 0.75, weight decay 0.05, gradients clipped at 1, no drop path, no relative
    positions.
    """
    return Detect(
        input_size="96",
        heads="small",
        relative_positions=False,
        scale_min=0.5,
        scale_max=1.5,
        drop_path=0.0,
        batch_size=16,
        global_batch_size=16,
        steps=300,
        warmup_steps=30,
        lr=2e-3,
        lr_schedule="steps",
        milestones="0.8",
        layer_decay=0.75,
        clip_grad=1.0,
        log_every=20,
        eval_every=0,
        save_every=100,
    )


SMALL = "maskrcnn_small"
RECIPES: dict[str, Callable[[], Detect]] = {
    recipe.__name__: recipe
    for recipe in (maskrcnn_vit_base_coco_12e, maskrcnn_vit_base_coco_100e, maskrcnn_vit_base_lvis, maskrcnn_small)
}
