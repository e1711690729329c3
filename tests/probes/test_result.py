"""What a probe's result says."""

import dataclasses

import pytest
import torch

from fasthpm import recipes
from fasthpm.data import DatasetInfo
from fasthpm.errors import UserError
from fasthpm.probes import result


def test_wrong_labels_are_refused() -> None:
    info = DatasetInfo(10, 1, (0.5,), (0.5,), ("a", "b"))
    one = dataclasses.replace(info, classes=("photos",))
    result.check_sets(("t", info), ("v", info))
    with pytest.raises(UserError, match=r"t has 1 class \(photos\), expected 2 or more; labels are missing"):
        result.check_sets(("t", one), ("v", info))
    with pytest.raises(UserError, match="t has 2 classes, v has 3 or others"):
        result.check_sets(("t", info), ("v", dataclasses.replace(info, classes=("a", "b", "c"))))
    with pytest.raises(UserError, match="has the label -1, expected 0 to 1; labels are missing"):
        result.check_labels(torch.tensor([0, -1]), "t", 2)
    with pytest.raises(UserError, match="all 3 samples of t have the label 1"):
        result.check_labels(torch.tensor([1, 1, 1]), "t", 2)


def test_effective_epochs_count_samples() -> None:
    plan = dataclasses.replace(recipes.debug(), data_path="synthetic:100", global_batch_size=20, steps_per_epoch=3)
    assert result.effective_epochs(plan, 10) == 2.0
    gone = dataclasses.replace(plan, data_path="/nowhere.beton")
    assert result.effective_epochs(gone, 9) == 3.0
