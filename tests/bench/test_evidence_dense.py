"""The table of pretrained beside from scratch."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from bench import evidence_dense
from fasthpm.errors import UserError


def cell(method: str, seed: int, miou: float) -> dict[str, Any]:
    return {"method": method, "seed": seed, "probes": {"miou": miou, "macc": 2 * miou, "aacc": 70.0}}


def test_differences_are_taken_seed_by_seed() -> None:
    runs = [cell("segment", 0, 10.0), cell("segment", 1, 12.0), cell("segment", 2, 50.0)]
    runs += [cell("segment_scratch", 1, 9.0), cell("segment_scratch", 0, 8.0)]
    rows = evidence_dense.summarise(runs)
    assert rows["segment"]["miou"]["mean"] == 24.0
    assert rows["segment"]["gain"]["miou"] == {
        "mean": 2.5,
        "std": pytest.approx(0.7071, abs=1e-4),
        "low": 2.0,
        "high": 3.0,
        "won": 2,
    }
    assert "gain" not in rows["segment_scratch"]
    settings = {"steps": 0, "epochs": 7, "shared": True}
    table = evidence_dense.markdown({"summary": rows, "settings": settings})
    assert "| segment | miou | 3 | 24.00 ± 22.54 | 10.00 | +2.50 ± 0.71 (2) |" in table
    assert "for 7 epochs (one run for all seeds)" in table


@pytest.mark.parametrize(("shared", "pretrainings"), [(False, [0, 1]), (True, [0, 0])])
def test_a_pretraining_per_seed_or_one_for_all(
    shared: bool, pretrainings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(evidence_dense.pretrain, "main", asked.append)
    arguments = argparse.Namespace(work=tmp_path, data=tmp_path, pretraining=None, epochs=10, shared=shared)
    made = [evidence_dense.pretrained(arguments, seed) for seed in (0, 1)]
    assert made == [tmp_path / f"pretrain-seed{seed}" for seed in pretrainings]
    words = asked[1]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert (flags["--seed"], flags["--epochs"], flags["--map_refresh_epochs"]) == (str(pretrainings[1]), "10", "2")


def test_a_folder_without_scenes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*train; make it with data_prep\.scenes"):
        evidence_dense.main(["--data", str(tmp_path), "--work", str(tmp_path / "work")])
