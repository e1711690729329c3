"""Probes: what a pretrained encoder is worth."""
