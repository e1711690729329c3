"""What a result says it was made with."""

import os
import subprocess
from pathlib import Path

import pytest

from fasthpm.run.versions import commit_of


def git(folder: Path, *words: str) -> str:
    identity = {f"GIT_{who}_{what}": "someone" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, env={**os.environ, **identity}, check=True, capture_output=True, text=True).stdout


def test_the_commit_is_of_the_checkout_that_tracks_the_package(tmp_path: Path) -> None:
    """An environment inside another project's checkout must not give that project's commit."""
    installed = tmp_path / "versions.py"
    installed.touch()
    assert commit_of(installed) == "unknown"
    git(tmp_path, "init", "--quiet")
    (tmp_path / "theirs").touch()
    git(tmp_path, "add", "theirs")
    git(tmp_path, "commit", "--quiet", "--message=theirs")
    assert commit_of(installed) == "unknown"
    git(tmp_path, "add", "versions.py")
    git(tmp_path, "commit", "--quiet", "--message=ours")
    assert commit_of(installed) == git(tmp_path, "rev-parse", "HEAD").strip()


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit_of(Path(__file__)) == "unknown"
