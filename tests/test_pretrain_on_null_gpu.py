"""`fasthpm pretrain` on "cuda": here a fake that counts and does nothing (tests/nullgpu), whose values mean nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.null_gpu import run_on_null_gpu

# Kept maps whose epochs end between the loader's, so that they change while batches are in flight.
FLAGS = (
    *("--recipe", "debug", "--data_path", "synthetic:64", "--batch_size", "8", "--warmup_epochs", "0"),
    *("--epochs", "3", "--steps_per_epoch", "4", "--log_every", "3", "--difficulty_every", "0"),
    *("--teacher_maps", "--map_refresh_epochs", "1", "--online_probe_every", "1"),
)
STOP = 6  # updates; of 12
QUIET = (2, 5, 10, 11)  # neither first after a start, nor with a reading, a checkpoint or a probe: from 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[dict[str, Any]]:
    """A run that stops, and the same that goes on."""
    flags = [*FLAGS, "--output_dir", str(folder)]
    found: list[dict[str, Any]] = run_on_null_gpu(
        "tests.nullgpu.command", json.dumps([[*flags, "--stop_after", str(STOP)], flags])
    )["runs"]
    return found


def test_the_command_runs_and_goes_on(runs: list[dict[str, Any]], folder: Path) -> None:
    """With maps, observers, checkpoints, export and report."""
    assert [run["done"] for run in runs] == [STOP, 12]
    assert [len(run["updates"]) for run in runs] == [STOP, 12 - STOP]
    assert {update["device"] for run in runs for update in run["updates"]} == {"cuda"}
    assert all(update["launches"] > 500 or update["graphs"] for run in runs for update in run["updates"])
    begun, continued = ([bool(update["graphs"]) for update in run["updates"]] for run in runs)
    assert begun == [False, False, True, True, False, False]  # then the first maps come
    assert continued == [False, False, True, True, True, True]
    made = ("encoder.safetensors", "report.md", "checkpoints/step-00000012", "maps/difficulty-00000002.maps")
    assert all((folder / name).exists() for name in (*made, "online_probe.safetensors"))


@pytest.mark.parametrize("number", QUIET)
def test_nothing_waits_between_readings(runs: list[dict[str, Any]], number: int) -> None:
    """From one batch to the next, data and observers included; batches come from pinned memory."""
    update = [update for run in runs for update in run["updates"]][number - 1]
    assert update["who"] == {}
    copies = {name.split()[1] for name in update["copies"]}
    assert copies == {"device>device", "pinned>device"}


def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    """By Inductor and Triton for sm_90, in the first update: nothing falls back, and the update is one graph then."""
    flags = [*FLAGS[:6], *("--epochs", "1", "--steps_per_epoch", "6", "--difficulty_every", "0", "--panel_every", "0")]
    asked = [[*flags, "--compile", "--output_dir", str(tmp_path)]]
    (run,) = run_on_null_gpu("tests.nullgpu.command", json.dumps(asked))["runs"]
    assert [update["compiled"] for update in run["updates"]] == 6 * [{"the teacher": "", "the step": ""}]
    _, second, *recorded = run["updates"]
    assert second["launches"] < 700
    assert [len(update["graphs"]) for update in recorded] == 4 * [1]
    assert recorded[2]["who"] == {}
