"""Launch environments, agreement on errors, the DeepSpeed configuration, parameter groups.

Ranks run this file too (`main`), started by the launchers that users have.
"""

import dataclasses
import json
import os
import sys
from argparse import ArgumentParser
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fasthpm.cli import run_rank
from fasthpm.errors import UserError
from fasthpm.ranks import agreement, deepspeed_json, engine
from fasthpm.ranks import launch as ranks_launch
from fasthpm.recipe import Recipe
from tests.helpers.launch import run_ranks

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "ds_configs").glob("*.json"))


# ------------------------------------------------------------------------------------------------------ the ranks
def main(argv: Any = None) -> None:
    parser = ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--wrong_rank", type=int)
    arguments = parser.parse_args(argv)
    with ranks_launch.session() as launch:
        if arguments.out:
            (arguments.out / f"rank{launch.rank}").write_text(json.dumps(described(launch)))
        with agreement.in_agreement():
            if launch.rank == arguments.wrong_rank:
                raise UserError("the input is 3, expected 4; write 4")
        print("all went on")


def described(launch: ranks_launch.Launch) -> tuple[object, ...]:
    from deepspeed.utils import groups

    timeout = groups._WORLD_GROUP._get_backend(launch.device).options._timeout
    return (*dataclasses.astuple(launch)[:4], launch.device.type, torch.get_num_threads(), timeout.total_seconds())


# ------------------------------------------------------------------------------------------------------ ranks
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ranks_know_their_place_and_one_rank_s_error_ends_all_with_one_line(tmp_path: Path, launcher: str) -> None:
    options = {"launcher": launcher, "env": {ranks_launch.TIMEOUT: "0.5"}}
    finished = run_ranks(Path(__file__), f"--out={tmp_path}", "--wrong_rank=1", **options)
    assert finished.status != 0
    lines = [line for line in finished.output.splitlines() if "expected 4" in line]
    assert lines == ["fasthpm: error: rank 1: the input is 3, expected 4; write 4"]
    assert f'File "{__file__}"' not in finished.output  # a traceback; torchrun prints one of its own
    assert "all went on" not in finished.output
    kind = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    for rank in range(2):
        *place, device, threads, timeout = json.loads((tmp_path / f"rank{rank}").read_text())
        assert (*place, device, timeout) == (rank, rank, 2, 2, kind, 30.0)
        assert kind == "cuda" or threads == max(1, len(os.sched_getaffinity(0)) // 2)


def test_without_deepspeed_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'fasthpm\[train\]'$"):
        ranks_launch.start()


def test_one_process_needs_no_launcher() -> None:
    finished = run_ranks(Path(__file__), "--wrong_rank=0", launcher="python")
    assert finished.status == 2
    assert finished.output.splitlines() == ["fasthpm: error: the input is 3, expected 4; write 4"]


def test_agreeing_on_nothing_goes_on_and_on_something_raises_it() -> None:
    agreement.agree(None)
    with pytest.raises(UserError, match="wrong"), agreement.in_agreement():
        raise UserError("wrong")


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, (0, 0, 1, 1)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "MASTER_ADDR": "h"}, (5, 1, 8, 4)),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, (1, 1, 2, 2)),
        (
            {
                "SLURM_PROCID": "3",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_NUM_TASKS": "4",
                "MASTER_ADDR": "h",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            },
            (3, 1, 4, 2),
        ),
        # A batch script itself is no rank of its allocation.
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, (0, 0, 1, 1)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            (1, 1, 2, 2),
        ),
    ],
)
def test_launchers_are_understood(env: dict[str, str], place: tuple[int, ...]) -> None:
    assert ranks_launch._place(env) == place
    assert tuple(int(env[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")) == place
    assert {"MASTER_ADDR", "MASTER_PORT"} <= env.keys()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_impossible_places_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ranks_launch._place(env)


def test_ranks_share_the_cores_and_a_process_alone_obeys_the_user() -> None:
    assert ranks_launch.threads(1, 8, {}) == 8
    assert ranks_launch.threads(2, 8, {"OMP_NUM_THREADS": "1"}) == 4  # torchrun's word, not the user's
    assert ranks_launch.threads(4, 2, {}) == 1
    assert ranks_launch.threads(1, 8, {"OMP_NUM_THREADS": "3"}) == 3
    assert ranks_launch.threads(1, 8, {"OMP_NUM_THREADS": "4,2"}) == 8


def test_timeout_is_minutes() -> None:
    assert ranks_launch.timeout({}) == timedelta(minutes=ranks_launch.DEFAULT_TIMEOUT_MINUTES)
    assert ranks_launch.timeout({ranks_launch.TIMEOUT: "0.5"}) == timedelta(seconds=30)
    for wrong in ("", "-1", "0", "nan", "inf", "five"):
        with pytest.raises(UserError, match=ranks_launch.TIMEOUT):
            ranks_launch.timeout({ranks_launch.TIMEOUT: wrong})


# ------------------------------------------------------------------------------------------------------ configuration
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
    assert deepspeed_json.merge_config(path, recipe, ranks) == agreeing
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


# ------------------------------------------------------------------------------------------------------ groups
def test_norms_biases_and_tokens_do_not_decay() -> None:
    model = nn.Module()
    model.cls_token, model.mask_token = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 1, 4))
    model.linear, model.norm = nn.Linear(4, 2), nn.LayerNorm(4)
    model.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["name"]: (group["weight_decay"], [names[id(parameter)] for parameter in group["params"]])
        for group in engine.parameter_groups(model, 0.05)
    }
    assert groups == {
        "no_decay": (0.0, ["cls_token", "linear.bias", "mask_token", "norm.bias", "norm.weight"]),
        "decay": (0.05, ["linear.weight"]),
    }


def test_empty_groups_are_left_out() -> None:
    assert [group["name"] for group in engine.parameter_groups(nn.LayerNorm(3), 0.1)] == ["no_decay"]


def test_a_lost_rank_is_named_before_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        lost = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711"
        with pytest.raises(RuntimeError), agreement.naming_lost_ranks(lambda: "after update 7"):
            raise RuntimeError(lost)
        expected = "error: rank 0 lost another rank after update 7 (Connection closed by peer [10.0.0.2]:4711); see"
        assert expected in capsys.readouterr().err
        with pytest.raises(RuntimeError), agreement.naming_lost_ranks(lambda: "after update 7"):
            raise RuntimeError("a size mismatch")
        assert capsys.readouterr().err == ""
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(lambda _: main(sys.argv[1:]))
