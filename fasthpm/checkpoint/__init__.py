"""Checkpoints: atomic save, verify, resume on any ranks; other people's files, read without running them."""

from fasthpm.checkpoint.folder import (
    FINETUNE_NOTES,
    MANIFEST,
    RECIPE,
    RunState,
    begin,
    checkpoint_path,
    clear_unfinished,
    commit,
    compare_recipes,
    continued,
    cpu_state,
    find_resume,
    newest_valid,
    oldest_step,
    read_state,
    require_space,
    rotate,
)
from fasthpm.checkpoint.foreign import load_reference
from fasthpm.checkpoint.pixels import pixels_note, pixels_of
from fasthpm.checkpoint.weights import checkpoint_of, has_teacher, initial_model, load_weights

__all__ = [
    "FINETUNE_NOTES",
    "MANIFEST",
    "RECIPE",
    "RunState",
    "begin",
    "checkpoint_of",
    "checkpoint_path",
    "clear_unfinished",
    "commit",
    "compare_recipes",
    "continued",
    "cpu_state",
    "find_resume",
    "has_teacher",
    "initial_model",
    "load_reference",
    "load_weights",
    "newest_valid",
    "oldest_step",
    "pixels_note",
    "pixels_of",
    "read_state",
    "require_space",
    "rotate",
]
