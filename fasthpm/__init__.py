"""FastHPM: Hard Patches Mining for masked image and video pretraining."""

__version__ = "0.1.0"
