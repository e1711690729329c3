"""FastHPM: Hard Patches Mining for masked image and video pretraining.

From Python as from the command line, with the same names: `fasthpm.pretrain(recipe="hpm_demo", data_path=…,
output_dir=…)`, and `knn`, `linear`, `finetune`, `embed`, `export`, `maps`, which take a run first.
"""

from fasthpm import entry  # isort: skip  (first: Ctrl-C is quiet from there on)

import importlib
from typing import TYPE_CHECKING, Any

from fasthpm.errors import UserError

if TYPE_CHECKING:
    from fasthpm.model import HPMViT, create_model
    from fasthpm.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["HPMViT", "Recipe", "UserError", "__version__", "create_model"]
LATE = {"HPMViT": "fasthpm.model", "create_model": "fasthpm.model", "Recipe": "fasthpm.recipe"}  # torch takes seconds


def __getattr__(name: str) -> Any:
    """The commands as functions, and what needs torch: their modules are imported when they are asked for."""
    if name in LATE:
        return getattr(importlib.import_module(LATE[name]), name)
    if name in entry.FUNCTIONS:
        return entry.function(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *entry.FUNCTIONS, *LATE})
