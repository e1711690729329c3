"""What random numbers are drawn for: each stream has a number of its own, or two would be correlated.

A key is made of (seed, epoch, stream), see `sampling.key_of`. No number may change: epochs of a run that is continued
and bytes of a set that is prepared again depend on it.
"""

import enum


@enum.unique
class Stream(enum.IntEnum):
    """The last part of a key; those of `data_prep` that are drawn as orders stand in the place of the epoch."""

    PREPARATION = 0  # whatever data_prep draws per sample
    ORDER = 1  # of an epoch, or of a prepared set
    CROP = 2
    COLOUR = 3
    SPARE = 4  # which sample stands in for one that does not decode
    BLOCKS = 5  # the order of blocks
    CLIP = 6  # start and crop of a clip
    SEGMENTS = 7  # a frame of each stretch of a video
    AUGMENT = 8  # augmentation of fine-tuning, segmentation and detection
    REPEAT = 9  # whether a sample comes once more in an epoch
    TURN = 10  # which way up a crop is
    CHANNELS = 11  # what becomes of each channel of a crop
    # in the place of the epoch, where no training comes
    GROUPS = 1 << 32  # the order of samples that are stored together
    PROPORTION = (1 << 32) + 1  # which images are stored as JPEGs
    SPLIT = 1 << 33  # which samples are set aside for validation
