"""Dense tasks on a run's encoder: segmentation, detection, and the probe of its patch features."""
