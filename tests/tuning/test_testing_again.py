"""Beside --evaluate: what says how and on what to test counts, what was trained may be said again, not otherwise."""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from fasthpm.dense.detection.settings import Detect
from fasthpm.dense.segmentation.settings import Segment
from fasthpm.errors import UserError
from fasthpm.options import option
from fasthpm.probes.finetune.settings import FineTune
from fasthpm.tuning.testing_again import UNKNOWN, check_set, counting


@dataclass(frozen=True)
class Toy:
    TESTS: ClassVar[frozenset[str]] = frozenset({"val_path", "batch_size", "evaluate"})

    val_path: str = option("", "data")
    steps: int = option(3, "updates")
    newer: int = option(0, "of a later version than the training")
    batch_size: int = option(2, "images", run_only=True)
    save_every: int = option(2, "updates", run_only=True)
    log_every: int = option(2, "updates", run_only=True)
    resume: str = option("auto", "checkpoint", run_only=True)
    evaluate: bool = option(False, "test", run_only=True)


STORED = {"val_path": "there", "steps": 3}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"val_path": "here", "batch_size": 9, "newer": 1, "evaluate": True}, ""),
        ({"steps": 3, "save_every": 5, "resume": "auto"}, ""),
        ({"steps": 4}, "--steps is 4, and the net is tested as it was trained, with 3; leave it out"),
        ({"resume": "none"}, "--resume is none, and --evaluate tests the newest checkpoint of output_dir; leave it"),
        ({"resume": "x/y"}, "--resume is x/y, and --evaluate tests the newest"),
    ],
)
def test_flags_count_or_are_what_was_trained_or_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        found = counting(Toy, given, STORED, "the net")
        assert found == {name: value for name, value in given.items() if name != "steps"}


def test_what_only_says_how_a_training_runs_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    counting(Toy, {"save_every": 6, "log_every": 6, "batch_size": 1}, STORED, "the net")
    assert "note: --log_every, --save_every: of a training, without a part in this test" in capsys.readouterr().err


def test_of_a_network_of_others_no_setting_of_training_is_known() -> None:
    with pytest.raises(UserError, match="--steps is 3, and the net is tested as it was trained; leave it out"):
        counting(Toy, {"steps": 3}, {"steps": UNKNOWN}, "the net")


def test_a_recipe_that_the_network_was_not_trained_by_is_refused() -> None:
    check_set("--recipe x", {"steps": 3, "unheard": 1}, STORED, "the net")
    with pytest.raises(UserError, match="--recipe x has steps 4, and the net is tested as it was trained, with 3; le"):
        check_set("--recipe x", {"steps": 4}, STORED, "the net")


# What a new field is, is to be decided: one of tests and test data, or of the training.
OF_TRAINING = {
    *("weights", "from_scratch", "input_size", "drop_path", "accum_iter", "global_batch_size", "lr", "layer_decay"),
    *("weight_decay", "clip_grad", "seed", "deepspeed_config", "resume", "log_every", "eval_every", "save_every"),
    *("keep_checkpoints", "stop_after", "flip"),
}
DENSE = {"steps", "warmup_steps", "warmup_start", "lr_schedule", "milestones", "max_bad_samples", "relative_positions"}
FIELDS: dict[type, set[str]] = {
    FineTune: OF_TRAINING
    | {
        "train_path",
        "global_pool",
        "epochs",
        "warmup_epochs",
        "blr",
        "min_lr",
        "mixup",
        "cutmix",
        "smoothing",
        "reprob",
    }
    | {"aa", "color_jitter", "crop_min", "num_sample", "sampling_rate", "frame_sampling", "ema_decay"}
    | {"token_policy", "keep_tokens", "difficulty_run", "token_difficulty"},
    Segment: OF_TRAINING
    | DENSE
    | {"train_images", "train_masks", "head_width", "layer_scale", "resize_min", "resize_max", "cat_max_ratio"}
    | {"distort"},
    Detect: OF_TRAINING
    | DENSE
    | {"train_json", "train_images", "keep_empty", "heads", "window", "activation_checkpointing", "scale_min"}
    | {"scale_max", "least_side", "loss", "repeat_threshold"},
}


@pytest.mark.parametrize("kind", FIELDS)
def test_every_setting_is_of_tests_or_of_the_training(kind: Any) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    assert names - FIELDS[kind] == kind.TESTS
    assert FIELDS[kind] < names
    assert set(getattr(kind, "PLACES", ())) <= names
