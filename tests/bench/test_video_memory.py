"""The bench of a video step's memory."""

import dataclasses
import json
from pathlib import Path

import pytest

from bench import video_memory
from fasthpm import recipes


def test_the_memory_bench_takes_turns_and_keeps_raw_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dataclasses.replace(recipes.from_name("hpm_video_demo"), channels=3, batch_size=2)
    real = {
        again: video_memory.measure(dataclasses.replace(small, activation_checkpointing=bool(again)))
        for again in (0, 1)
    }
    assert all(found["seconds"] > 0 and found["gib"] >= 0 and found["gib_before"] > 0 for found in real.values())
    monkeypatch.setattr(video_memory, "in_a_process", lambda arguments, again: real[again])
    video_memory.main(["--rounds", "2", "-o", str(tmp_path / "memory.json")])
    raw = json.loads((tmp_path / "memory.json").read_text())["raw"]
    assert raw == {"kept": [real[0]] * 2, "checkpointed": [real[1]] * 2}
    assert "| checkpointed |" in capsys.readouterr().out
