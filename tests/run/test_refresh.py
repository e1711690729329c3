"""Maps renewed in mid-run, with batches asked for ahead as on a GPU (a real thread, but no device)."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fasthpm import pretrain
from fasthpm.data.device import DeviceLoader
from fasthpm.maps.run import RunMaps


@pytest.mark.parametrize(
    "kind",
    [{"teacher_maps": True}, {"mask_policy": "attention", "mask_ratio": 0.45, "throw_ratio": 0.4}],
    ids=["difficulty", "attention"],
)
def test_no_batch_has_the_maps_before(kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    scores = RunMaps.scores

    def checked(maps: RunMaps, batch: Any) -> torch.Tensor | None:
        used.append(maps.store is not None)
        if maps.store is not None:
            assert torch.equal(batch.maps, maps.store.read(batch.ids))
        return scores(maps, batch)

    monkeypatch.setattr(importlib.import_module("fasthpm.pretrain"), "on_device", DeviceLoader)
    monkeypatch.setattr(RunMaps, "scores", checked)
    pretrain(
        recipe="debug",
        model="hpm_vit_pico_patch4_28",
        data_path="synthetic:64",
        output_dir=tmp_path,
        epochs=3,
        steps_per_epoch=3,  # not the loader's epoch of 4: the refresh finds batches in flight
        batch_size=16,
        map_refresh_epochs=1,
        panel_every=0,
        difficulty_every=0,
        **kind,
    )
    assert used == [False] * 3 + [True] * 6
