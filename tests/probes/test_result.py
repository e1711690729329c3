"""What a probe's result says."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fasthpm import recipes
from fasthpm.data import DatasetInfo, read_info
from fasthpm.errors import UserError, unlike
from fasthpm.probes import finetune, knn, linear, online, result
from tests.helpers.data_fixtures import picture
from tests.helpers.finetuning import refused


def test_wrong_labels_are_refused() -> None:
    info = DatasetInfo(10, 1, (0.5,), (0.5,), ("a", "b"))
    one = dataclasses.replace(info, classes=("photos",))
    result.check_sets(("t", info), ("v", info))
    with pytest.raises(UserError, match=r"t has 1 class \(photos\), expected 2 or more; labels are missing"):
        result.check_sets(("t", one), ("v", info))
    with pytest.raises(UserError, match="t has 2 classes, v has 3"):
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


def test_unlabelled_samples_are_refused_with_their_number(run: Path, tmp_path: Path) -> None:
    for index in range(6):
        picture(index, grey=True).save(tmp_path / f"{index}.png")
    for name, first in (("whole", 0), ("test", -1)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{k}.png\t{max(k % 3 - 1, first)}\n" for k in range(6)))
    whole, test = tmp_path / "whole.txt", tmp_path / "test.txt"
    words = f"2 of 6 samples of {test} are unlabelled (label -1), and a probe needs labels"
    for command in (knn, linear, finetune):
        for paths in ((whole, test), (test, whole)):
            out = ("-o", tmp_path / "out.json") if command is knn else ("--output_dir", tmp_path / "out")
            flags = ("--global_batch_size", "2", "--batch_size", "2") * (command is not knn)
            assert words in refused(command, run, "--train_path", paths[0], "--val_path", paths[1], *flags, *out)
    with pytest.raises(UserError, match=r"has the label -1, .* \(2 of 6 samples\)"):
        result.check_labels(torch.tensor([0, -1, 1, 1, -1, 0]), "a.beton", 2)  # of an older set
    info = read_info(test)
    with pytest.raises(UserError, match=r"2 of 6 samples .* are unlabelled, and an online probe needs labels"):
        online.check(dataclasses.replace(recipes.debug(), online_probe_every=1), info, {})


def test_which_classes_differ_is_said() -> None:
    assert unlike("a", ["x"], "b", ["x", "y"]) == "a has 1 class, b has 2"
    assert unlike("a", ["x", "y"], "b", ["x", "z"]) == "a has 'y' among its classes where b has 'z'"
    said = unlike("a", list("uvwxyz"), "b", list("uabcde"))
    assert said == "a has 'v', 'w', 'x' among its classes where b has 'a', 'b', 'c' (and 2 more differ)"
