"""Detection: Mask R-CNN on a run's encoder as ViTDet has it, COCO's and LVIS's sets and measures, and the command."""

from fasthpm.dense.detection.command import main

__all__ = ["main"]
