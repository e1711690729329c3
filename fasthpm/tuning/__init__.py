"""Training an encoder with a head: what fine-tuning, segmentation and detection share."""
