"""Scripts that run before training: images and videos into prepared sets, and a check of what they wrote."""
