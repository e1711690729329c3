"""Dense tasks on a run's encoder: segmentation, detection, and probes of single patches."""
