"""Verifying prepared video sets."""

import json
from pathlib import Path

import pytest

from data_prep import verify
from fasthpm.errors import UserError
from tests.helpers.video_sets import damaged


def test_verify_finds_what_opening_does_not(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.main([str(prepared)])
    assert "is sound: 6 videos, 60 frames, 2 classes, 3 channels" in capsys.readouterr().out
    broken = damaged(prepared, tmp_path / "set", videos=(1,))
    with pytest.raises(UserError, match=r"frames\.bin has another sha256"):
        verify.main([str(broken)])
    info = json.loads((broken / "info.json").read_text())
    info["sha256"].pop("frames.bin")
    (broken / "info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"video 1\): frame 0 does not decode"):
        verify.main([str(broken)])
    (broken / "manifest.csv").write_text("path\n")
    info["sha256"].pop("manifest.csv")
    (broken / "info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"manifest\.csv has 1 lines, expected 7"):
        verify.main([str(broken)])
