"""The commands by name, for the `fasthpm` script and for Python: `fasthpm.knn("runs/a", …)` is `fasthpm knn runs/a …`.

A command's `main` takes a command line or keywords, which `cli.Parser` spells out as flags: both pass the same checks.
Modules are named by strings and imported when they are called; nothing here needs what they need.
"""

import os
import signal
import sys

EXIT_INTERRUPTED = 130
PACKAGES = ("fasthpm", "data_prep")  # whose modules are commands


# ------------------------------------------------------------------------------------------------------ Ctrl-C
def is_command(line: list[str], program: str) -> bool:
    """Whether a process is a command of ours, not someone else's Python that imports us.

    - `line`: how Python was started, `python -m fasthpm.pretrain …`; `program`: `sys.argv[0]`
    """
    module = line[line.index("-m") + 1 :][:1] if "-m" in line else []
    ours = bool(module) and module[0].partition(".")[0] in PACKAGES
    return ours or os.path.basename(program) == "fasthpm"


def leave_quietly() -> None:
    """Let Ctrl-C end a command of ours with one line as long as it only imports, and has nothing to clean up."""
    ours = is_command(sys.orig_argv, sys.argv[0] if sys.argv else "")
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        try:
            signal.signal(signal.SIGINT, leave)
        except ValueError:  # not in the main thread: nobody starts a command there
            return


def leave(number: int = signal.SIGINT, frame: object = None) -> None:
    """End this process at once, as Ctrl-C does, with one line."""
    sys.stdout.flush()
    os.write(2, b"fasthpm: interrupted\n")  # not through sys.stderr, which may be what was interrupted
    os._exit(EXIT_INTERRUPTED)


leave_quietly()  # before the imports that take time

import dataclasses  # noqa: E402
import importlib  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextvars import ContextVar  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

COMMANDS = {
    "pretrain": ("fasthpm.pretrain", "pretrain a model (one process; use deepspeed or torchrun for more)"),
    "knn": ("fasthpm.probes.knn", "k-NN accuracy of a run's encoder"),
    "linear": ("fasthpm.probes.linear", "linear probe of a run's encoder"),
    "finetune": ("fasthpm.probes.finetune", "fine-tune a run's encoder on labelled images"),
    "segment": ("fasthpm.dense.segmentation", "UPerNet on a run's encoder: the class of every pixel"),
    "detect": ("fasthpm.dense.detection", "Mask R-CNN on a run's encoder: boxes and masks of objects"),
    "dense": ("fasthpm.dense.probe", "k-NN and linear probe of patches, on images with masks"),
    "embed": ("fasthpm.probes.embed", "features of any images, as NumPy arrays"),
    "import": ("fasthpm.exchange.importing", "make a run of an HPM, MAE or AMT checkpoint"),
    "export": ("fasthpm.exchange.exporting", "write a run's weights for timm, torchvision or Hugging Face"),
    "visualize": ("fasthpm.pictures.visualize", "pictures: image, reconstruction, true and predicted loss, mask"),
    "maps": ("fasthpm.pictures.map_images", "difficulty maps of any images, and the images ranked by them"),
    "recipes": ("fasthpm.commands.listing", "list the recipes, show one, compare two"),
    "report": ("fasthpm.pictures.report", "report.md and curves of a run"),
    "plan": ("fasthpm.commands.plan", "memory, speed and GPU-hours of a recipe on GPUs that you name"),
    "doctor": ("fasthpm.commands.doctor", "what this machine is, what is installed, and what bounds training"),
}
FUNCTIONS = (
    "pretrain",
    "knn",
    "linear",
    "finetune",
    "segment",
    "detect",
    "dense",
    "embed",
    "export",
    "maps",
)  # of `import fasthpm`
MODULES = ("pretrain", "dense", "maps")  # those of them that are modules too; see `CallableModule`

FROM_PYTHON: ContextVar[bool] = ContextVar("FROM_PYTHON", default=False)  # the process is the caller's, not ours


# ------------------------------------------------------------------------------------------------------ calls
@dataclass(frozen=True, repr=False)
class Result:
    """What a command made: paths and figures, the same on every rank. Shown with one field a line."""

    def __repr__(self) -> str:
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        lines = (f"  {name}: {value if isinstance(value, Path) else repr(value)}" for name, value in fields)
        return "\n".join((type(self).__name__, *lines))


def call(command: str, run: Any = None, **flags: Any) -> Any:
    """Do what `fasthpm COMMAND RUN --FLAG VALUE …` does, in this process. **Returns:** the command's `Result`.

    - `run`: the positional argument of the commands that have one
    - `flags`: lists where a flag takes several values, True and False for switches; None = not given

    **Raises:** `UserError` where the command line would print an error; `KeyboardInterrupt` after Ctrl-C.
    """
    given = flags if run is None else {"run": run, **flags}
    token = FROM_PYTHON.set(True)
    try:
        return importlib.import_module(COMMANDS[command][0]).main(given)
    finally:
        FROM_PYTHON.reset(token)


class CallableModule(ModuleType):
    """A module that is also the function of its name.

    `fasthpm.pretrain` and `fasthpm.maps` are both: launchers start the one and code imports the other as modules, and
    importing either puts it where `fasthpm.__getattr__` would have given the function.
    """

    def __call__(self, run: Any = None, **flags: Any) -> Any:
        return call(self.__name__.rpartition(".")[2], run, **flags)


def make_callable(module: str) -> None:
    """Make a module that is being imported a `CallableModule`."""
    sys.modules[module].__class__ = CallableModule


def function(command: str) -> Callable[..., Any]:
    """The Python function of a command."""
    if command in MODULES:
        module = importlib.import_module(f"fasthpm.{command}")
        assert isinstance(module, CallableModule)
        return module

    def of_command(run: Any = None, **flags: Any) -> Any:
        return call(command, run, **flags)

    of_command.__name__ = of_command.__qualname__ = command
    of_command.__doc__ = (
        f"{COMMANDS[command][1]}.\n\nRUN and the flags of `fasthpm {command} --help`, as keywords; see "
        f"`fasthpm.entry.call`."
    )
    return of_command
