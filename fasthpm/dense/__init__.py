"""Dense tasks on a run's encoder: segmentation, detection, and the probe of its patch features."""

from fasthpm import entry

entry.make_callable(__name__)  # `fasthpm.dense(…)` is the command, this room is what the three share
