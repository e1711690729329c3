"""Wheels for a machine that lacks packages: unpacked without pip."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import gpu_site


def test_what_is_missing_comes_from_the_wheels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "not_here-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("nothere/__init__.py", "answer = 42\n")
    monkeypatch.setattr(gpu_site, "PACKAGES", {"numpy": "numpy", "not-here": "nothere"})
    assert gpu_site.main(wheels, site) == 0
    assert [path.name for path in site.iterdir()] == ["nothere"]  # numpy is there already
    program = f"import sys; sys.path.append({str(site)!r}); import nothere; print(nothere.answer)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "42\n"
    monkeypatch.setattr(gpu_site, "PACKAGES", {"not-packed": "notpacked"})
    assert gpu_site.main(wheels, site) == 1
    assert "gpu_site: missing not-packed" in capsys.readouterr().err
