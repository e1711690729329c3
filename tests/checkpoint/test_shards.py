"""Each rank's part of the training state as files."""

from pathlib import Path

import pytest
import torch

from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.checkpoint import shards


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(checkpoint_folder.UserError, match="holds no training state"):
        shards.SavedState(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "rank-00000.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(checkpoint_folder.UserError, match="is not a training state of this program"):
        shards.SavedState(tmp_path)


def test_a_file_that_the_disk_cannot_hold_is_an_os_error(small_disk: Path) -> None:
    taken = shards.Snapshot({"0/master": torch.zeros(16 << 20)}, {})
    with pytest.raises(OSError, match="No space left on device"):
        shards.write(taken, small_disk / "shards" / "rank-00000.safetensors")
