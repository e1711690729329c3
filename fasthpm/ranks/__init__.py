"""The ranks of a run: launch environment, agreement on errors, DeepSpeed's JSON and engine."""

from fasthpm.ranks.agreement import agree, by_first, in_agreement, naming_lost_ranks, share
from fasthpm.ranks.deepspeed_json import merge_config
from fasthpm.ranks.engine import (
    build_engine,
    count_micro_step,
    decay_moves,
    ends_update,
    freeze_last_layer,
    grad_norm,
    hush,
    only_recorded,
    set_lr,
    set_weight_decay,
    update_applied,
    updates_on_device,
)
from fasthpm.ranks.launch import Launch, minutes, session, timeout

__all__ = [
    "Launch",
    "agree",
    "build_engine",
    "by_first",
    "count_micro_step",
    "decay_moves",
    "ends_update",
    "freeze_last_layer",
    "grad_norm",
    "hush",
    "in_agreement",
    "merge_config",
    "minutes",
    "naming_lost_ranks",
    "only_recorded",
    "session",
    "set_lr",
    "set_weight_decay",
    "share",
    "timeout",
    "update_applied",
    "updates_on_device",
]
