"""The DeepSpeed JSON and the recipe: who owns which number, checked and merged."""

import json
from pathlib import Path
from typing import Any

from fasthpm.errors import UserError, nearest
from fasthpm.recipe import Recipe

PRESETS = Path(__file__).parents[2] / "ds_configs"  # beside the package, in a checkout and where a wheel is installed

# ------------------------------------------------------------------------------------------------------ configuration
RECIPE_OWNS = {
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accum_iter",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "clip_grad",
}
# Every key that is known to work with the EMA teacher and with our own metrics and checkpoints.
JSON_OWNS: dict[str, tuple[str, ...] | None] = {  # None: anything inside
    "zero_optimization": (
        "stage",
        "reduce_bucket_size",
        "allgather_bucket_size",
        "allgather_partitions",
        "reduce_scatter",
        "overlap_comm",
        "contiguous_gradients",
        "round_robin_gradients",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
    ),
    "bf16": ("enabled", "immediate_grad_update", "check_grad_overflow"),
    "data_types": ("grad_accum_dtype", "buffer_dtype"),
    "communication_data_type": None,
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "activation_checkpointing": None,
    "flops_profiler": None,
    "comms_logger": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "steps_per_print": None,
}
REFUSED = {
    "optimizer": "the recipe owns the optimizer (lr, betas, weight_decay); remove the block",
    "scheduler": "the recipe owns the schedule (warmup_epochs, min_lr, epochs); remove the block",
    "fp16": 'use bf16 instead: {"enabled": true}',
    "amp": 'use bf16 instead: {"enabled": true}',
    "torch_autocast": 'use bf16 instead: {"enabled": true}',
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "FastHPM writes the metrics; remove the block"),
    "checkpoint": "FastHPM writes the checkpoints; remove the block",
}
OFFLOAD = "offload is not supported with the EMA teacher yet; remove it, or use stage 3 on more devices"


def merge_config(path: str | Path, recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON that `path` means, with what the recipe owns filled in.

    - `path`: of a file, or the name of a preset
    - `recipe`: resolved for `world_size`

    **Raises:** `UserError` for a file that cannot be read, keys that are unknown or refused, and contradictions.
    """
    if recipe.global_batch_size != recipe.batch_size * recipe.accum_iter * world_size or not recipe.accum_iter:
        raise ValueError(f"the recipe is not resolved for {world_size} ranks")
    config = _read_json(find_config(path))
    _check_keys(config, str(path))
    _check_stage(config, str(path))
    for key, owner in RECIPE_OWNS.items():
        value, wanted = config.get(key, "auto"), getattr(recipe, owner)
        if key == "gradient_clipping" and recipe.clip_per_tensor:
            wanted = 0.0  # each parameter by itself, see `clipping`
        if value != "auto" and (isinstance(value, bool) or value != wanted):
            raise UserError(
                f"{path}: {key} is {value!r}, but the recipe's {owner} is {wanted!r}; the recipe owns it: write "
                f'"auto" there, or change --{owner}'
            )
        config[key] = wanted
    config["timers"] = {"throughput": {"enabled": False}}  # DeepSpeed's waits for the device twice a micro-step
    if _uses_bf16(config):
        config.setdefault("data_types", {}).setdefault("buffer_dtype", "bf16")
        if recipe.on_nonfinite == "skip":
            _check_gradients(config["bf16"], str(path))
        elif _stage(config) in (1, 2):
            config["bf16"].setdefault("check_grad_overflow", False)  # else 13 kernels and a wait for every parameter
    elif recipe.on_nonfinite == "skip" and not _stage(config):
        raise UserError(
            f"{path}: ZeRO stage 0 in float32 does not look at gradients before it uses them, but the recipe's "
            f"on_nonfinite is 'skip'; use stage 1, or --on_nonfinite rollback"
        )
    return config


def preset_names() -> list[str]:
    """Of the files in `ds_configs/`, without their suffix."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def find_config(config: str | Path) -> Path:
    """The file that is meant by a preset's name or by a path.

    A path into a `ds_configs` folder that is not here means the preset: recipes recorded before presets had names hold
    such paths, and those only open from the repository's root.
    """
    path, presets = Path(config), preset_names()
    if str(config) in presets:
        return PRESETS / f"{config}.json"
    recorded = path.parent.name == PRESETS.name and path.suffix == ".json" and path.stem in presets
    return PRESETS / path.name if recorded and not path.exists() else path


def _check_gradients(bf16: dict[str, Any], path: str) -> None:
    """Have ZeRO 1 and 2 look at the gradients before they use them, as the other stages always do in bf16."""
    if bf16.get("check_grad_overflow", True) is not True:
        raise UserError(
            f"{path}: bf16.check_grad_overflow is {bf16['check_grad_overflow']!r}, but the recipe's on_nonfinite is "
            f"'skip', which needs it; remove it there, or use --on_nonfinite rollback"
        )
    bf16["check_grad_overflow"] = True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        presets = preset_names()
        raise UserError(
            f"DeepSpeed config {path} cannot be read ({reason}){nearest(path.stem, presets)}; name a file, or one of "
            f"the presets {', '.join(presets)}"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"DeepSpeed config {path} holds a {type(config).__name__}, expected an object {{...}}")
    return config


def _check_keys(config: dict[str, Any], path: str) -> None:
    known = [*RECIPE_OWNS, *JSON_OWNS]
    for key, value in config.items():
        if key in REFUSED:
            raise UserError(f"{path}: {key!r} is not allowed: {REFUSED[key]}")
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, known)}")
        inner = JSON_OWNS.get(key)
        if inner is not None:
            _check_block(key, value, inner, path)


def _check_block(block: str, value: Any, known: tuple[str, ...], path: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {block} is {value!r}, expected an object {{...}}")
    for key in value:
        if "offload" in key:
            raise UserError(f"{path}: {block}.{key}: {OFFLOAD}")
        if key not in known:
            raise UserError(f"{path}: unknown or unsupported key {block}.{key}{nearest(key, known)}")


def _check_stage(config: dict[str, Any], path: str) -> None:
    stage = _stage(config)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    accumulation = config.get("data_types", {}).get("grad_accum_dtype")
    own = "bf16" if _uses_bf16(config) else "fp32"
    if stage == 0 and accumulation not in (None, own):
        raise UserError(
            f"{path}: data_types.grad_accum_dtype is {accumulation!r}, but ZeRO stage 0 accumulates in {own} here; "
            f"remove it, or use stage 1"
        )


def _stage(config: dict[str, Any]) -> Any:
    return config.get("zero_optimization", {}).get("stage", 0)


def _uses_bf16(config: dict[str, Any]) -> bool:
    return bool(config.get("bf16", {}).get("enabled", False))
