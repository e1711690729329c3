"""DeepSpeed's configuration: taken from the recipe, refused where it says something else."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasthpm.errors import UserError
from fasthpm.ranks import deepspeed_json
from fasthpm.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "ds_configs").glob("*.json"))


def merged(tmp_path: Path, config: object, **fields: Any) -> dict[str, Any]:
    path = tmp_path / "deepspeed.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    recipe = Recipe(**{"batch_size": 4, "global_batch_size": 16, **fields}).resolve(100, world_size=2)
    return deepspeed_json.merge_config(path, recipe, 2)


@pytest.mark.parametrize("preset", PRESETS, ids=[path.stem for path in PRESETS])
def test_presets_take_everything_from_the_recipe(preset: Path) -> None:
    recipe = Recipe(batch_size=4, global_batch_size=16).resolve(100, world_size=2)
    config = deepspeed_json.merge_config(preset, recipe, 2)
    assert config["train_batch_size"] == 16
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 5.0
    assert f"zero{config['zero_optimization']['stage']}" in preset.stem
    assert ("bf16" in preset.stem) == config.get("bf16", {}).get("enabled", False)
    assert preset.stem in (preset.parent / "README.md").read_text()


@pytest.mark.parametrize(
    ("preset", "policy"),
    [(p, policy) for p in PRESETS for policy in ("halt", "skip") if (p.stem, policy) != ("zero0_fp32", "skip")],
    ids=lambda value: getattr(value, "stem", value),
)
def test_deepspeed_waits_for_no_device_of_its_own(preset: Path, policy: str) -> None:
    recipe = Recipe(batch_size=4, global_batch_size=8, on_nonfinite=policy).resolve(100, world_size=2)
    config = deepspeed_json.merge_config(preset, recipe, 2)
    assert config["timers"] == {"throughput": {"enabled": False}}
    if "bf16" in config and config["zero_optimization"]["stage"] in (1, 2):
        assert config["bf16"]["check_grad_overflow"] is (policy == "skip")


@given(batch=st.integers(1, 64), accum=st.integers(1, 8), ranks=st.integers(1, 16), clip=st.floats(0, 10))
def test_a_literal_passes_only_if_it_agrees(
    tmp_path_factory: pytest.TempPathFactory, batch: int, accum: int, ranks: int, clip: float
) -> None:
    recipe = Recipe(batch_size=batch, accum_iter=accum, clip_grad=clip).resolve(10**6, world_size=ranks)
    path = tmp_path_factory.mktemp("config") / "c.json"
    agreeing = {
        "zero_optimization": {"stage": 1},
        **{k: getattr(recipe, v) for k, v in deepspeed_json.RECIPE_OWNS.items()},
    }
    path.write_text(json.dumps(agreeing))
    merged = deepspeed_json.merge_config(path, recipe, ranks)
    assert {key: merged[key] for key in agreeing} == agreeing
    for key, owner in deepspeed_json.RECIPE_OWNS.items():
        path.write_text(json.dumps({**agreeing, key: agreeing[key] + 1}))
        with pytest.raises(UserError) as raised:
            deepspeed_json.merge_config(path, recipe, ranks)
        for part in (str(path), key, repr(agreeing[key] + 1), owner, repr(agreeing[key])):
            assert part in str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "holds a list"),
        ({"optimizer": {"type": "Adam"}}, "recipe owns the optimizer"),
        ({"scheduler": {}}, "recipe owns the schedule"),
        ({"fp16": {"enabled": True}}, "use bf16"),
        ({"tensorboard": {"enabled": True}}, "writes the metrics"),
        ({"zero_optimisation": {"stage": 1}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({"zero_optimization": {"stage": True}}, "stage is True"),
        ({"zero_optimization": 2}, "expected an object"),
        ({"zero_optimization": {"stage": 1, "reduce_buckets_size": 1}}, "did you mean 'reduce_bucket_size'"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload is not supported"),
        ({"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "bf16"}}, "accumulates in fp32 here"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "accumulates in bf16"),
        ({"train_batch_size": 64}, "train_batch_size is 64, but the recipe's global_batch_size is 16"),
        ({"gradient_clipping": "1.0", "zero_optimization": {"stage": 1}}, "gradient_clipping is '1.0'"),
    ],
)
def test_wrong_configurations_are_one_line(tmp_path: Path, config: object, message: str) -> None:
    if isinstance(config, dict) and not {"zero_optimization", "bf16"} & config.keys():
        config = {**config, "zero_optimization": {"stage": 1}}
    with pytest.raises(UserError, match=message) as raised:
        merged(tmp_path, config)
    assert "deepspeed.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_float32_without_zero_cannot_skip_updates(tmp_path: Path) -> None:
    stage = {"zero_optimization": {"stage": 0}}
    assert merged(tmp_path, stage, on_nonfinite="rollback")["zero_optimization"] == {"stage": 0}
    with pytest.raises(UserError, match="does not look at gradients before it uses them"):
        merged(tmp_path, stage, on_nonfinite="skip")


def test_a_missing_configuration_is_named() -> None:
    recipe = Recipe(batch_size=4).resolve(100, world_size=1)
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read \(No such file or directory\)"):
        deepspeed_json.merge_config("nowhere.json", recipe, 1)


def test_presets_have_names_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(batch_size=4).resolve(100, world_size=1)
    assert deepspeed_json.preset_names() == [path.stem for path in PRESETS]
    for path in PRESETS:
        assert deepspeed_json.merge_config(path.stem, recipe, 1) == deepspeed_json.merge_config(path, recipe, 1)


def test_a_recorded_path_into_ds_configs_opens_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until presets had names, recipe.json held paths that only open from the repository's root."""
    monkeypatch.chdir(tmp_path)
    for recorded in ("ds_configs/zero2_bf16.json", "/moved/FastHPM/ds_configs/zero2_bf16.json"):
        assert deepspeed_json.find_config(recorded) == ROOT / "ds_configs" / "zero2_bf16.json"
    own = tmp_path / "ds_configs" / "zero2_bf16.json"
    own.parent.mkdir()
    own.write_text("{}")
    assert deepspeed_json.find_config("ds_configs/zero2_bf16.json").resolve() == own
    assert deepspeed_json.find_config("zero2_bf16") == ROOT / "ds_configs" / "zero2_bf16.json"


@pytest.mark.parametrize(
    ("config", "guess"),
    [
        ("zero1_bf61", "; did you mean 'zero1_bf16'?"),
        ("elsewhere/zero1_bf16.json", "; did you mean 'zero1_bf16'?"),
        ("ds_configs/zero1_bf61.json", "; did you mean 'zero1_bf16'?"),
        ("x", ""),
        ("", ""),
        ("y" * 5000, ""),
    ],
)
def test_an_unknown_preset_is_one_line(config: str, guess: str) -> None:
    with pytest.raises(UserError) as raised:
        deepspeed_json.merge_config(config, Recipe(batch_size=4).resolve(100, world_size=1), 1)
    message = str(raised.value)
    assert message.endswith(f"){guess}; name a file, or one of the presets {', '.join(p.stem for p in PRESETS)}")
    assert "\n" not in message


def test_bf16_rounds_buffers_too_unless_asked_not_to(tmp_path: Path) -> None:
    bf16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    assert merged(tmp_path, bf16)["data_types"] == {"buffer_dtype": "bf16"}
    asked = {**bf16, "data_types": {"buffer_dtype": "fp32"}}
    assert merged(tmp_path, asked)["data_types"] == {"buffer_dtype": "fp32"}


def test_an_unresolved_recipe_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="not resolved"):
        deepspeed_json.merge_config(PRESETS[0], Recipe(), 2)
