"""What can be set of a segmentation or a detection alike."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fasthpm.checkpoint import run_of
from fasthpm.data.options import MAX_BAD_SAMPLES
from fasthpm.errors import UserError
from fasthpm.options import PAPER, RELEASED, option, validate
from fasthpm.probes.finetune.settings import has_bf16
from fasthpm.rules import sides_of

SCHEDULES = ("poly", "steps")
WARMUP_SHARE = 10  # a warm-up takes at most one in so many updates, however short --steps makes the training
DROP = 0.1  # of the learning rate at each milestone


@dataclass(frozen=True, kw_only=True)
class Dense:
    """One training of an encoder with a dense head. The defaults are a base; recipes say the rest.

    - `TESTS`: fields that a test without training goes by; the others are the training's
    - `PLACES`: those that name where data lie, of which one replaces all
    """

    TESTS: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "evaluate", "batch_size", "num_workers", "pictures", "show", "data_path"}
    )
    PLACES: ClassVar[tuple[str, ...]] = ("data_path",)

    output_dir: str = option("", "folder for results and checkpoints; empty = RUN/segment or RUN/detect", run_only=True)
    weights: str = option("student", "which encoder of the run to start from", choices=("student", "teacher"))
    from_scratch: bool = option(False, "start from random weights, layer_decay 1: what pretraining is compared with")
    evaluate: bool = option(False, "do not train: test the newest checkpoint of output_dir", run_only=True)
    # model
    input_size: str = option(
        "512", "side of the crops that are trained on, or HEIGHTxWIDTH; positions are interpolated", origin=PAPER
    )
    drop_path: float = option(0.1, "stochastic depth, growing linearly to this", low=0, below=1, origin=RELEASED)
    # optimisation
    batch_size: int = option(2, "images per device and micro-step", low=1, run_only=True)
    accum_iter: int = option(0, "micro-steps per update; 0 = global_batch_size / (batch_size x devices)", run_only=True)
    global_batch_size: int = option(
        16, "images per update over all devices; 0 = batch_size x devices x accum_iter", origin=PAPER
    )
    steps: int = option(160_000, "updates", low=1, origin=PAPER)
    warmup_steps: int = option(
        1500, f"updates of linear warm-up, at most one in {WARMUP_SHARE} of all", low=0, origin=RELEASED
    )
    warmup_start: float = option(
        1e-6, "share of the learning rate that the warm-up begins with", low=0, high=1, origin=RELEASED
    )
    lr: float = option(1e-4, "learning rate of the head at this global_batch_size", above=0, origin=PAPER)
    lr_schedule: str = option(
        "poly", "poly: down to 0 in a line; steps: a tenth at each milestone", choices=SCHEDULES, origin=RELEASED
    )
    milestones: str = option("0.8889,0.9630", "shares of the updates after which lr_schedule steps takes a tenth")
    layer_decay: float = option(
        0.65, "each layer further from the head learns slower by this factor", above=0, high=1, origin=RELEASED
    )
    weight_decay: float = option(
        0.05, "AdamW weight decay (none on biases, norms, cls token and positions)", low=0, origin=PAPER
    )
    clip_grad: float = option(0.0, "clip the gradient norm to this; 0 = off", low=0)
    seed: int = option(0, "seed of the head, the order, the augmentations and drop path")
    # the run itself
    num_workers: int = option(0, "augmenting processes per device; 0 = cores / devices on this machine", run_only=True)
    max_bad_samples: float = option(
        MAX_BAD_SAMPLES, "share of the training set that may be unreadable", low=0, high=1, run_only=True
    )
    pictures: int = option(8, "test images that are drawn beside truth and prediction; 0 = none", low=0, run_only=True)
    show: str = option(
        "", "channels that pictures show, from 1 or by names of bands: 3,2,1; empty = the first ones", run_only=True
    )
    deepspeed_config: str = option(
        "", "DeepSpeed preset or JSON; empty = zero1_bf16, or zero1_fp32 where a CPU lacks bf16", run_only=True
    )
    resume: str = option("auto", "auto = newest valid checkpoint in output_dir, none, or a checkpoint", run_only=True)
    log_every: int = option(50, "updates between two readings of the losses", low=1, run_only=True)
    eval_every: int = option(16_000, "updates between two tests; 0 = only at the end", low=0, run_only=True)
    save_every: int = option(2_000, "updates between two checkpoints", low=1, run_only=True)
    keep_checkpoints: int = option(1, "checkpoints kept", low=1, run_only=True)
    stop_after: int = option(0, "stop after this many updates, keeping the schedule; 0 = never", low=0, run_only=True)

    def __post_init__(self) -> None:
        validate(self)
        _ = self.image_size, self.drops

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of crops."""
        return sides_of(self.input_size)

    @property
    def drops(self) -> tuple[int, ...]:
        """Updates after which the learning rate is a tenth, with lr_schedule steps."""
        try:
            shares = [float(part) for part in self.milestones.split(",") if part.strip()]
        except ValueError:
            shares = [-1.0]
        if not all(0 < share <= 1 for share in shares) or shares != sorted(shares):
            raise UserError(f"milestones is {self.milestones!r}, expected rising shares of the updates, like 0.89,0.96")
        return tuple(round(share * self.steps) for share in shares)

    @property
    def science(self) -> dict[str, Any]:
        """The fields that decide what is learnt."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["run_only"]}

    def differing(self, other: "Dense") -> set[str]:
        """The fields of `science` in which this one and `other`, of the same kind, are not alike."""
        return {name for name, value in self.science.items() if value != getattr(other, name)}

    def lr_at(self, update: int) -> float:
        """Learning rate of update `update` (from 0): linear warm-up, then a line down to 0 at the last update (mmseg's
        poly of power 1, counted from the end of the warm-up), or a tenth at each milestone (detectron2's)."""
        warmup = min(self.warmup_steps, self.steps // WARMUP_SHARE)
        if update < warmup:
            return self.lr * (self.warmup_start + (1 - self.warmup_start) * update / warmup)
        if self.lr_schedule == "steps":
            return self.lr * DROP ** sum(update >= drop for drop in self.drops)
        return self.lr * (1 - (update - warmup) / (self.steps - warmup))


def complete(settings: Any, run: Path, name: str) -> Any:
    """`settings` with the output folder and the DeepSpeed preset filled in; `name`: of the command."""
    folder = f"{name}_scratch" if settings.from_scratch else name
    zero1 = "zero1_bf16" if has_bf16() else "zero1_fp32"
    return dataclasses.replace(
        settings,
        output_dir=settings.output_dir or str(run_of(run) / folder),
        deepspeed_config=settings.deepspeed_config or zero1,
    )
