"""What data is, wherever it lies."""

import json
import shutil
from pathlib import Path

import pytest

from fasthpm.data.identity import READ, identity_of
from fasthpm.errors import UserError

SIDECAR = {"num_samples": 2, "channels": 1, "mean": [0.5], "std": [0.1], "classes": ["a"], "bytes": 3}


def prepared(path: Path, digest: str, **changes: object) -> Path:
    """As much of a prepared set as its identity needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"xyz")
    path.with_suffix(".json").write_text(json.dumps({**SIDECAR, "sha256": digest, **changes}))
    return path


def images(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number % 250]))
    return folder


def test_a_prepared_set_is_its_hash(tmp_path: Path) -> None:
    one, same, other = (prepared(tmp_path / f"{name}.beton", name[0] * 64) for name in ("1", "1 again", "2"))
    assert identity_of(one) == identity_of(same) == f"sha256:{'1' * 64}"
    assert identity_of(other) == f"sha256:{'2' * 64}"
    assert identity_of(f"{one},{other}") == identity_of(f"{same},{other}")
    assert len({identity_of(f"{one},{other}"), identity_of(f"{other},{one}"), identity_of(one)}) == 3


def test_a_sidecar_without_a_hash_has_its_figures(tmp_path: Path) -> None:
    one, same = (prepared(tmp_path / name, "") for name in ("a.beton", "b.beton"))
    other = prepared(tmp_path / "c.beton", "", mean=[0.4])
    assert identity_of(one) == identity_of(same) != identity_of(other)


def test_shards_are_the_hashes_of_all(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        names = [f"x-{k}-of-2.beton" for k in (0, 1)]
        for k, name in enumerate(names):
            prepared(tmp_path / folder / name, str(k + (folder == "c")) * 64)
        index = {**SIDECAR, "format": "ffcv-shards", "shards": names}
        (tmp_path / folder / "x.json").write_text(json.dumps(index))
    a, b, c = (identity_of(tmp_path / folder / "x.beton") for folder in "abc")
    assert a == b != c


@pytest.mark.parametrize("change", ["content", "name", "one more", "class"])
def test_a_folder_is_its_names_and_what_is_in_them(tmp_path: Path, change: str) -> None:
    one = images(tmp_path / "one")
    shutil.copytree(one, tmp_path / "deep" / "two")
    two = tmp_path / "deep" / "two"
    assert identity_of(one) == identity_of(two)
    if change == "content":
        (two / "a" / "2.png").write_bytes(b"!")
    elif change == "name":
        (two / "a" / "2.png").rename(two / "a" / "9.png")
    elif change == "one more":
        (two / "a" / "9.png").write_bytes(b"!")
    else:
        (two / "b").rename(two / "c")
    assert identity_of(one) != identity_of(two)


def test_a_large_folder_is_not_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr("fasthpm.data.identity._content", lambda path: read.append(path) or "")
    identity_of(images(tmp_path / "many", READ + 50))
    assert len(read) == len(set(read)) == READ


def test_others(tmp_path: Path) -> None:
    assert identity_of("synthetic:8") == "synthetic:8"
    with pytest.raises(UserError, match="is not there or not an image source"):
        identity_of(tmp_path / "nothing")
