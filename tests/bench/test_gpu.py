"""The GPU bench: rehearsed with the smallest sizes; parts that fail, hang or are not there; going on."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_parts
from bench.gpu import OverdueError, Part, attempt, page, run_parts
from bench.gpu_parts import AbsentError, Settings
from fasthpm.errors import UserError
from fasthpm.ranks.launch import Launch

SETTINGS = Settings(Launch(0, 0, 1, 1, torch.device("cpu")))
SOON = time.time() + 1e6


def test_a_rehearsal_runs_to_the_end_and_is_read_as_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the steps for all of them; `python -m bench.gpu OUT --rehearse` does the rest."""
    monkeypatch.setattr(gpu_parts, "FORMS", ("hpm",))
    parts = ("machine", "correctness", "steps", "profile", "attention")
    gpu.main([str(tmp_path), "--rehearse", "--parts", *parts])
    found = json.loads((tmp_path / gpu.RESULTS).read_text())["parts"]
    assert {name: part["state"] for name, part in found.items()} == dict.fromkeys(parts, "done")
    checks = found["correctness"]["result"]["checks"]
    assert all(one["error"] == 0 for one in checks if "bf16" not in one["what"])  # the CPU against itself
    assert all(0 < one["error"] < one["bound"] for one in checks if "bf16" in one["what"])
    assert len(checks) == 5 * 4 + 2
    assert set(found["steps"]["result"]["median_seconds"]) == {"hpm", "eager_mae", "eager_hpm"}
    assert "exact HPM / eager MAE" in found["steps"]["result"]["ratios"]
    text = capsys.readouterr().out
    assert (tmp_path / gpu.PAGE).read_text().strip() == text.strip()
    for line in ("| steps | done |", "| mae: gradient | 0 | 0.001 |  |", "| 4 | eager_hpm | ", "| `aten::"):
        assert line in text
    gpu.main([str(tmp_path), "--table"])
    assert capsys.readouterr().out == text
    for idle in (["--rehearse"], ["--parts", "steps"]):
        with pytest.raises(UserError, match=f"{idle[0]} has no effect here: --table runs nothing"):
            gpu.main([str(tmp_path), "--table", *idle])
    with pytest.raises(UserError, match=r"holds no results\.json"):
        gpu.main([str(tmp_path / "none"), "--table"])


def a_part(monkeypatch: pytest.MonkeyPatch, name: str, run: Any, seconds: float = 5.0) -> None:
    monkeypatch.setitem(gpu.PARTS, name, Part(seconds, run))


def broken(settings: Settings, found: Any) -> None:
    """A part that breaks."""
    raise ValueError("odd\nand more")


def test_a_part_that_fails_is_kept_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(settings: Settings, found: Any) -> None:
        raise AbsentError("no such thing here")

    def hangs(settings: Settings, found: Any) -> None:
        found.update(batch_size=1, median_seconds={}, ratios={"kept": {"median": 2.0}})
        while True:
            with contextlib.suppress(Exception):  # what swallows failures does not swallow this
                time.sleep(60)

    a_part(monkeypatch, "a", broken)
    a_part(monkeypatch, "b", absent)
    a_part(monkeypatch, "c", hangs, seconds=0.2)
    a_part(monkeypatch, "d", lambda settings, found: found.update(batch_size=1))
    found = run_parts(tmp_path, ["a", "b", "c", "d"], SETTINGS, SOON)["parts"]
    assert [(part["state"], part.get("error")) for part in found.values()] == [
        ("failed", "ValueError: odd"),
        ("absent", "no such thing here"),
        ("failed", "not done in 0 s"),
        ("done", None),
    ]
    assert 'raise ValueError("odd' in "".join(found["a"]["trace"])
    assert found["c"]["seconds"] < 5
    assert "| 1 | kept | 2.000 |" in (tmp_path / gpu.PAGE).read_text()
    assert found["d"]["result"] == {"batch_size": 1}
    assert json.loads((tmp_path / gpu.RESULTS).read_text())["parts"] == found
    assert "| a | failed | 0 | ValueError: odd | A part that breaks |" in (tmp_path / gpu.PAGE).read_text()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in "abcd":
        a_part(monkeypatch, name, lambda settings, found, name=name: ran.append(name) or broken(settings, found))
    gpu.write(tmp_path, {"bench": "gpu", "parts": {"a": {"state": "running"}, "b": {"state": "left out", "error": ""}}})
    found = run_parts(tmp_path, "abc", SETTINGS, SOON)["parts"]
    assert ran == ["b", "c"]  # a has ended its process once
    assert found["a"] == {"state": "failed", "error": "the process ended in it"}
    run_parts(tmp_path, "abc", SETTINGS, SOON)
    assert ran == ["b", "c"]  # what failed fails again
    found = run_parts(tmp_path, "abcd", SETTINGS, time.time() + gpu.LEAST - 1)["parts"]
    assert ran == ["b", "c"]
    assert found["d"]["state"] == "left out"
    assert "7 s were left" in page(gpu.read(tmp_path))


def test_results_are_there_before_a_part_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_part(monkeypatch, "a", lambda settings, found: os._exit(9))
    child = os.fork()
    if not child:
        run_parts(tmp_path, "a", SETTINGS, SOON)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert gpu.read(tmp_path)["parts"] == {"a": {"state": "running"}}


def test_native_code_that_never_returns_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake: signals are blocked, so that no Python of the main thread hears of the time that is over."""
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        attempt(Part(1.0, lambda settings, found: time.sleep(60)), SETTINGS, 0.1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == gpu.EXIT_AGAIN


def test_baselines_that_fail_cost_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(settings: Settings, *variants: str) -> dict[str, Any]:
        if "eager_hpm" in variants:
            raise torch.OutOfMemoryError("too large\nby far")
        return {"batch_size": 1, "median_seconds": {}, "ratios": {}}

    monkeypatch.setattr(gpu_parts, "timed", timed)
    found: dict[str, Any] = {}
    gpu_parts.steps(SETTINGS, found)
    assert found["without_baselines"] == "OutOfMemoryError: too large"
    assert "The baselines could not be timed: OutOfMemoryError: too large" in gpu.of_steps(found)


def test_a_device_that_computes_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_parts.losses.ranking_loss
    calls = iter(range(99))
    monkeypatch.setattr(gpu_parts.losses, "ranking_loss", lambda *both: real(*both) * (1 + 1e-3 * (next(calls) % 2)))
    value, gradient = gpu_parts.ranked(4, 9, torch.device("cpu"))
    assert not value["good"]
    assert not gradient["good"]
    assert value["error"] == pytest.approx(1e-3, rel=0.01)


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="torch sees no GPU here; add --rehearse"):
        gpu.main([str(tmp_path)])


def test_time_that_is_over_is_no_failure_that_code_could_take_for_its_own() -> None:
    assert not issubclass(OverdueError, Exception)
