"""Whole runs: real DeepSpeed, every preset, real launchers once each; wrong input, NaN, Ctrl-C, signals, resume."""

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fasthpm.checkpoint.folder import damage, newest_valid
from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from fasthpm.maps.store import MapStore
from fasthpm.pretrain import COMPILE_SECONDS, parse_arguments, update
from fasthpm.ranks.watchdog import Watchdog
from fasthpm.recipe import Recipe
from fasthpm.run.metrics import OVERVIEW, overview_tag
from fasthpm.run.records import read_metrics
from fasthpm.speed.graph import Eager
from tests.helpers.launch import ROOT, check_ranks, ranks_of, run_ranks, running_ranks

PRESETS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
PICO = ("--model", "hpm_vit_pico_patch4_28")  # every second update here is in bf16, which many CPUs emulate
SHORT = ("--recipe", "debug", *PICO, "--data_path", "synthetic:64", "--epochs", 1, "--warmup_epochs", 0)
QUIET = ("--difficulty_every", 0, "--panel_every", 0)  # what the first test below looks at
MODULE = "fasthpm.pretrain"


def preset(name: str) -> tuple[str, str]:
    """The flag for a file of ds_configs/."""
    return "--deepspeed_config", f"ds_configs/{name}.json"


def weights(run: Path, which: str = "student") -> dict[str, torch.Tensor]:
    """Float32 weights of the newest checkpoint."""
    return load_weights(run, which)[0].state_dict()


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize("name", PRESETS)
def test_two_deepspeed_ranks_run_every_preset(name: str, tmp_path: Path) -> None:
    launcher = "deepspeed" if name == PRESETS[0] else "forked"
    arguments = (*SHORT, *preset(name), "--batch_size", 8, "--log_every", 2, "--output_dir", tmp_path)
    output = check_ranks(MODULE, *arguments, launcher=launcher)
    assert "finished 4 of 4 updates" in output
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [2, 4]
    assert all(0 < record["loss"] < 10 for record in records)
    assert records[0]["images_per_second"] > 0
    assert 0 < records[0]["teacher_percent"] < 100
    assert 1 < records[1]["rankme"] <= 16  # of the last batch, over both ranks
    assert "| rankme |" in (tmp_path / "report.md").read_text()
    for name_of_file in (
        "report.md",
        "curves.png",
        "encoder.safetensors",
        "deepspeed.json",
        "panels/step-00000004.png",
    ):
        assert (tmp_path / name_of_file).stat().st_size > 0
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("predictor/teacher_spearman")] == [2, 4]
    tags = board.Tags()["scalars"]
    shown = {tag.partition("/")[2] for tag in tags if not tag.startswith(OVERVIEW)}
    told = {name for record in records for name, value in record.items() if value} - {"step", "epoch", "time"}
    assert shown == told
    assert {"bad_samples", "skipped_updates"} <= set(records[-1]) - shown  # nothing but zeros
    assert sorted(tags)[:2] == [overview_tag("loss"), overview_tag("difficulty_spearman")]
    assert set(records[-1]) - set(records[0]) == {"difficulty_spearman", "difficulty_auc", "rankme"}  # at the end
    assert -1 < records[-1]["difficulty_spearman"] < 1
    assert set(board.Tags()["images"]) == {overview_tag("panel"), "panel"}
    folder = newest_valid(tmp_path, pytest.fail)
    assert folder is not None
    assert damage(folder) == ""
    student, teacher = weights(tmp_path), weights(tmp_path, "teacher")
    moved = distance(student, teacher)
    assert 0 < moved < 0.1  # the teacher follows the student, and is not the student
    assert {value.dtype for value in student.values()} == {torch.float32}


def test_ranks_and_accumulation_share_one_trajectory(tmp_path: Path) -> None:
    """The same global batch on 1 rank, on 2 ranks and in 2 micro-steps gives the same weights but for rounding."""
    common = (*SHORT, *QUIET, *preset("zero1_fp32"), "--global_batch_size", 16, "--clip_grad", 0)
    runs = {"one": (1, 16), "two": (2, 8), "accumulated": (1, 8)}
    for name, (ranks, batch_size) in runs.items():
        arguments = (*common, "--batch_size", batch_size, "--output_dir", tmp_path / name)
        check_ranks(MODULE, *arguments, ranks=ranks, launcher="forked")
    one = weights(tmp_path / "one")
    start = comparable(one)
    for name in ("two", "accumulated"):
        # Adam turns the rounding noise of gradients that are exactly zero into steps: leave those tensors out.
        other = {key: value for key, value in weights(tmp_path / name).items() if key in start}
        assert distance(start, other) < 2e-5
    losses = [read_metrics(tmp_path / name)[-1]["loss"] for name in runs]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def comparable(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose gradients are not exactly zero: not key biases, nor the predictor's last ones."""
    zero = ("attn.qkv.bias", "decoder_norm_losspred.bias", "decoder_pred_losspred.bias")
    return {key: value for key, value in state.items() if not key.endswith(zero)}


@pytest.mark.parametrize(
    ("program", "name", "ranks"),
    [((MODULE,), "zero1_bf16", 1), ((ROOT / "tests/helpers/gpu_branches.py", "pretrain"), "zero2_bf16", 2)],
    ids=["cpu", "gpu_branches"],
)
def test_resume_continues_as_if_nothing_had_happened(
    program: tuple[Any, ...], name: str, ranks: int, tmp_path: Path
) -> None:
    common = (*program, *SHORT, *QUIET, *preset(name), "--batch_size", 8, "--log_every", 1)
    check_ranks(*common, "--output_dir", tmp_path / "straight", launcher="forked", ranks=ranks)
    broken = (*common, "--output_dir", tmp_path / "broken")
    check_ranks(*broken, "--stop_after", 3, launcher="forked", ranks=ranks)
    output = check_ranks(*broken, launcher="forked", ranks=ranks)
    assert "resuming from" in output
    assert f"at update 3 of {8 // ranks}" in output
    for which in ("student", "teacher"):
        assert distance(weights(tmp_path / "straight", which), weights(tmp_path / "broken", which)) == 0
    losses = [[r["loss"] for r in read_metrics(tmp_path / name)] for name in ("straight", "broken")]
    assert losses[0] == losses[1]
    again = check_ranks(*broken, launcher="forked", ranks=ranks)  # nothing is left to do
    assert f"finished {8 // ranks} of {8 // ranks} updates" in again


def test_a_run_goes_on_with_other_ranks_and_another_zero_stage(tmp_path: Path) -> None:
    """2 ranks, then 1 with two micro-steps, then 2 in bf16 under ZeRO 3: the curve of an undisturbed run."""
    common = (*SHORT, *QUIET, "--epochs", 2, "--log_every", 1, "--batch_size", 8)
    float32 = preset("zero1_fp32")
    check_ranks(MODULE, *common, *float32, "--output_dir", tmp_path / "straight", launcher="forked")
    moving = (*common, "--output_dir", tmp_path / "moving")
    check_ranks(MODULE, *moving, *float32, "--stop_after", 3, launcher="forked")
    output = check_ranks(MODULE, *moving, *float32, "--stop_after", 6, launcher="forked", ranks=1)
    assert "at update 3 of 8, written by 2 ranks" in output
    assert "global batch 16 = 8 x 1 x 2" in output
    output = check_ranks(MODULE, *moving, *preset("zero3_bf16"), launcher="forked")
    assert "at update 6 of 8, written by 1 rank" in output
    straight, moved = (read_metrics(tmp_path / name) for name in ("straight", "moving"))
    assert [record["step"] for record in moved] == [record["step"] for record in straight]
    for first, last, tolerance in ((0, 3, 0), (3, 6, 1e-4), (6, 8, 2e-2)):
        losses = ([record["loss"] for record in run[first:last]] for run in (moved, straight))
        assert next(losses) == pytest.approx(next(losses), rel=tolerance)
    for name in ("lr", "alpha", "ema_momentum"):
        assert [r[name] for r in moved] == [r[name] for r in straight]


@pytest.mark.parametrize(
    ("launcher", "arguments", "message"),
    [
        ("torchrun", ["--data_path", "/nowhere/train.beton"], "/nowhere/train.beton"),
        ("forked", ["--global_batch_size", "20"], "global_batch_size 20 is not a multiple of batch_size 8 x 2 devices"),
        ("forked", ["--mask_ration", "0.5"], "unknown argument '--mask_ration'; did you mean '--mask_ratio'"),
    ],
)
def test_wrong_input_ends_all_ranks_with_one_line(
    launcher: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    finished = run_ranks(MODULE, *SHORT, *arguments, "--output_dir", run, launcher=launcher)
    assert finished.status != 0
    lines = [line for line in finished.output.splitlines() if "fasthpm: error" in line]
    assert len(lines) == 1, finished.output
    assert message in lines[0]
    assert not run.exists()


def test_wrong_input_on_one_machine(tmp_path: Path) -> None:
    """The remaining wrong inputs, one process each: a line with value and remedy, status 2, nothing half-written."""
    contradiction = tmp_path / "contradiction.json"
    contradiction.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))
    taken = tmp_path / "taken"
    check_ranks(MODULE, *SHORT, "--stop_after", 1, "--output_dir", taken, launcher="forked", ranks=1)
    before = sorted(path for path in taken.rglob("*"))
    truncated = tmp_path / "truncated.beton"
    truncated.write_bytes(b"\0" * 100)
    cases = {
        "gradient_clipping is 1.0, but the recipe's clip_grad is 5.0": ("--deepspeed_config", contradiction),
        "belongs to a run with mask_ratio 0.75, this one has 0.6": ("--mask_ratio", 0.6, "--output_dir", taken),
        "truncated.beton": ("--data_path", truncated),
        "cannot be written (Not a directory)": ("--output_dir", truncated / "run"),
    }
    for message, arguments in cases.items():
        output_dir = tmp_path / "fresh"
        finished = run_ranks(MODULE, *SHORT, "--output_dir", output_dir, *arguments, launcher="forked", ranks=1)
        assert finished.status == 2, finished.output
        lines = [line for line in finished.output.splitlines() if line.startswith("fasthpm: error")]
        assert len(lines) == 1, finished.output
        assert message in lines[0]
        assert "Traceback" not in finished.output
        assert not output_dir.exists()
    assert sorted(path for path in taken.rglob("*")) == before


def test_a_loss_that_is_not_finite_stops_all_ranks_and_is_kept(tmp_path: Path) -> None:
    finished = run_ranks(
        MODULE,
        *SHORT,
        "--batch_size",
        4,
        "--lr",
        1e30,
        "--clip_grad",
        0,
        "--log_every",
        4,
        "--output_dir",
        tmp_path,
        launcher="forked",
    )
    assert finished.status != 0
    lines = [line for line in finished.output.splitlines() if "fasthpm: error" in line]
    assert len(lines) == 1, finished.output
    assert "the loss is not finite by update 4" in lines[0]
    for rank in (0, 1):
        (path,) = (tmp_path / "nonfinite").glob(f"*/rank{rank}.pt")
        saved = torch.load(path)
        bad = saved["micro_steps"][0]
        assert bad["step"] < 4
        assert bad["ids"].shape == (4,)
        assert bad["mask"].shape == (4, 49)
        assert not torch.isfinite(bad["metrics"]).all()
        assert path.parent.name == f"update-{bad['step'] + 1:08d}"
        assert len(saved["grad_norms"]) == 4
    assert not (tmp_path / "checkpoints").exists()


def endless_run(output_dir: Path) -> tuple[object, ...]:
    return (
        *SHORT,
        "--epochs",
        5000,
        "--batch_size",
        8,
        "--log_every",
        1,
        "--save_every",
        10**6,
        "--panel_every",
        0,
        "--output_dir",
        output_dir,
    )


def test_ctrl_c_saves(tmp_path: Path) -> None:
    with running_ranks(MODULE, *endless_run(tmp_path), launcher="forked", ranks=1) as process:
        wait_for_file(tmp_path / "metrics.jsonl")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "fasthpm: interrupted" in output
    assert "run the same command to continue" in output
    assert newest_valid(tmp_path, pytest.fail) is not None


def test_a_second_ctrl_c_does_not_wait() -> None:
    program = (
        "import os, signal; from fasthpm import ranks; from fasthpm.ranks.signals import StopSignals\n"
        "with ranks.session(), StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('first', stop.received, stop.interrupted, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('second', flush=True)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 130, finished.stderr
    assert finished.stdout == "first True True\n"


def test_a_rank_that_is_stuck_ends_the_job_and_is_named(tmp_path: Path) -> None:
    limit = {"FASTHPM_TIMEOUT_MINUTES": "0.2"}
    with running_ranks(MODULE, *endless_run(tmp_path), env=limit, launcher="forked") as launched:
        wait_for_file(tmp_path / "metrics.jsonl")
        ranks = ranks_of(launched.pid, MODULE)
        for rank in (0, 1):
            wait_for_file(tmp_path / ".heartbeats" / f"rank-{rank:05d}.json")
        ranks[1].suspend()
        begin = time.monotonic()
        output, _ = launched.communicate(timeout=120)
    assert launched.returncode != 0
    assert time.monotonic() - begin < 60
    lines = [line for line in output.splitlines() if "fasthpm: error" in line]
    assert len(lines) == 1, output
    assert re.search(r"no update for 9\.6 s after update \d+: rank 1 \(update \d+\) gave no sign of life", lines[0])
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    """The same command then continues, as if nothing had happened."""
    common = (*SHORT, "--epochs", 60, "--batch_size", 8, "--log_every", 1, "--save_every", 100, "--panel_every", 0)
    arguments = (*common, "--output_dir", tmp_path / "run")
    launcher = "torchrun" if number == signal.SIGTERM else "forked"
    with running_ranks(MODULE, *arguments, launcher=launcher) as launched:
        wait_for_file(tmp_path / "run" / "metrics.jsonl")
        ranks = ranks_of(launched.pid, "fasthpm.pretrain")
        assert len(ranks) == 2
        ranks[1].send_signal(number)
        output, _ = launched.communicate(timeout=60)
    assert launched.returncode == 0, output
    stopped = int(re.findall(r"preempted at update (\d+) of 240", output)[0])
    folder = newest_valid(tmp_path / "run", pytest.fail)
    assert folder is not None
    assert folder.name == f"step-{stopped:08d}"
    output = check_ranks(MODULE, *arguments, "--stop_after", stopped + 2, launcher="forked")
    assert f"at update {stopped} of 240" in output
    straight = tmp_path / "straight"
    check_ranks(MODULE, *common, "--output_dir", straight, "--stop_after", stopped + 2, launcher="forked")
    losses = [[r["loss"] for r in read_metrics(where)][-2:] for where in (tmp_path / "run", straight)]
    assert losses[0] == losses[1]


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 90
    while not (path.is_file() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert path.is_file()


def test_attention_maps_are_made_by_all_ranks_and_survive_a_stop(tmp_path: Path) -> None:
    """AMT under ZeRO 3 on two ranks, stopped in the midst of an epoch, continued by one rank under ZeRO 1."""
    amt = ("--mask_policy", "attention", "--mask_ratio", 0.45, "--throw_ratio", 0.4, "--map_refresh_epochs", 1)
    common = (*SHORT, *QUIET, "--epochs", 3, *amt, "--global_batch_size", 16, "--output_dir", tmp_path)
    check_ranks(MODULE, *common, *preset("zero3_bf16"), "--batch_size", 8, "--stop_after", 6, launcher="forked")
    store = MapStore(tmp_path / "maps" / "attention-00000001.maps")
    assert (store.header.epoch, store.header.num_samples, store.header.grid) == (1, 64, (7, 7))
    rows = store.read(torch.arange(64)).flatten(1).float()
    assert (rows.amax(1) == 1).all()  # every sample's map, scaled
    assert (rows.amin(1) == 0).all()
    again = check_ranks(MODULE, *common, *preset("zero1_bf16"), "--batch_size", 16, launcher="forked", ranks=1)
    assert "at update 6 of 12" in again
    assert "finished 12 of 12 updates" in again
    assert MapStore(tmp_path / "maps" / "attention-00000002.maps").header.epoch == 2


OUT = ["--recipe", "debug", "--output_dir", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*OUT, "--mask_ration", "0.6"], "unknown argument '--mask_ration'; did you mean '--mask_ratio'"),
        ([*OUT, "--mask_rati", "0.6"], "unknown argument '--mask_rati'"),
        ([*OUT, "--norm_pix_loss", "False"], "unknown argument 'False'"),
        ([*OUT, "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        ([*OUT, "--recipe", "hpm_vit_base_in1k_100e"], "did you mean 'hpm_vit_base_in1k_"),
        (["--recipe", "debug"], "--output_dir is missing"),
        ([*OUT, "--recipe", "hpm_demo"], "--data_path is missing"),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(arguments)
    assert message in str(caught.value)


def test_flags_override_and_launcher_flags_are_swallowed() -> None:
    recipe = parse_arguments([*OUT, "--local_rank=1", "--no-flip", "--norm_pix_loss", "--blr", "1e-3"])
    assert (recipe.flip, recipe.norm_pix_loss, recipe.blr) == (False, True, 1e-3)


def test_every_field_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name}" in text
        assert field.metadata["help"]


def test_fast_modes_run_from_the_command_line(tmp_path: Path) -> None:
    """One process, a few updates, with every mode."""
    flags = (
        "--recipe",
        "debug",
        "--input_size",
        32,
        "--predictor",
        "shared",
        "--decoder_attention",
        "cross",
        "--teacher_scale",
        2,
        "--teacher_maps",
        "--stop_after",
        6,
        "--log_every",
        1,
        "--steps_per_epoch",
        4,
        "--output_dir",
        tmp_path / "run",
    )
    done = run_ranks("fasthpm.pretrain", *flags, launcher="forked", ranks=1)
    assert done.status == 0, done.output
    assert (
        "fast modes: teacher_maps True, predictor shared, decoder_attention cross, teacher_scale 2; 0." in done.output
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(-1 < record["map_spearman"] < 1 for record in records[4:])
    assert [path.name for path in (tmp_path / "run" / "maps").iterdir()] == ["difficulty-00000001.maps"]


def test_the_first_update_may_take_as_long_as_compiling_takes(tmp_path: Path) -> None:
    """Only until the step is compiled; what DeepSpeed's engine does is not what is looked at."""
    phases = []
    watchdog = Watchdog(tmp_path, 0, 1, timeout=1.0)
    recipe = parse_arguments(OUT).resolve(64, world_size=1)

    class Engine(SimpleNamespace):
        def __call__(self, *_: Any) -> Any:
            phases.append((watchdog._note["phase"], watchdog._longer))
            return SimpleNamespace(loss=None)

    nothing = lambda *_: None  # noqa: E731
    engine = Engine(
        basic_optimizer=SimpleNamespace(param_groups=[]), backward=nothing, step=nothing, get_global_grad_norm=nothing
    )
    metrics: Any = SimpleNamespace(waiting_for_data=contextlib.nullcontext, add=nothing, updated=nothing)
    batch = SimpleNamespace(images=None, ids=None)
    run: Any = SimpleNamespace(
        recipe=recipe,
        done=0,
        launch=SimpleNamespace(device="cpu"),
        skipped=[],
        engine=engine,
        micro_step=Eager(engine),
        teacher=None,
        maps=None,
        batches=iter([batch] * 2),
        step=SimpleNamespace(compiled=False, end_update=lambda applied: None),
        observers=[],
    )
    update(run, metrics, watchdog)
    run.step.compiled = True
    update(run, metrics, watchdog)
    assert phases == [("compiling", COMPILE_SECONDS), ("step", 0.0)]
