"""Fine-tuning: settings, building, training, testing, and the command that puts them together."""

from fasthpm.probes.finetune.command import main

__all__ = ["main"]
