"""Semantic segmentation: UPerNet on a run's encoder, its data, its test, and the command."""

from fasthpm.dense.segmentation.command import main

__all__ = ["main"]
