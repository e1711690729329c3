"""Scripts that run before training: images and videos into prepared sets, and a check of what they wrote."""

import fasthpm  # noqa: F401  (first: Ctrl-C is quiet from there on)
