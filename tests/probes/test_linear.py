"""The linear probe as a command: real loaders and engine, resuming, and what it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fasthpm.probes import linear
from tests.helpers.data_fixtures import image_folder, prepare
from tests.helpers.finetuning import DATA, flat_folder, read, refused, same_weights, start
from tests.helpers.launch import check_ranks

LINEAR = (*DATA, "--epochs", "3", "--global_batch_size", "16", "--batch_size", "8", "--eval_every", "1")


@pytest.mark.parametrize("protocol", ["moco", "mae"])
@pytest.mark.parametrize("cached", [True, False])
def test_linear_probe_resumes_as_if_nothing_had_happened(
    run: Path, tmp_path: Path, protocol: str, cached: bool
) -> None:
    words = (
        run,
        *LINEAR,
        "--protocol",
        protocol,
        "--lr",
        "0.3",
        *(["--cache_features"] if cached else []),
        "--output_dir",
    )
    start(linear, *words, tmp_path / "straight")
    start(linear, *words, tmp_path / "broken", "--stop_after_epoch", "1")
    assert not (tmp_path / "broken" / "result.json").exists()
    start(linear, *words, tmp_path / "broken")
    assert same_weights(tmp_path / "straight" / linear.HEAD, tmp_path / "broken" / linear.HEAD)
    found = read(tmp_path / "broken" / "result.json")
    assert found["accuracy"] == read(tmp_path / "straight" / "result.json")["accuracy"]
    assert found["protocol"].startswith(f"linear ({protocol}), 3 epochs")
    assert len(found["checkpoint_hash"]) == 64


def test_linear_probe_is_the_same_on_two_ranks(run: Path, tmp_path: Path) -> None:
    words = (run, *LINEAR, "--protocol", "moco", "--lr", "0.3", "--output_dir")
    check_ranks("fasthpm", "linear", *words, tmp_path / "two", launcher="forked")
    single = [*words, tmp_path / "one"]
    single[single.index("8")] = "16"
    start(linear, *single)
    one, two = (load_file(tmp_path / name / linear.HEAD) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    results = [read(tmp_path / name / "result.json")["accuracy"] for name in ("one", "two")]
    assert results[0] == results[1]


def test_linear_probe_refuses_what_does_not_fit(run: Path, tmp_path: Path) -> None:
    two = prepare(image_folder(tmp_path / "two", 40, grey=True, sizes=((28, 28),)), tmp_path / "two.beton")
    one = prepare(flat_folder(tmp_path / "one"), tmp_path / "one.beton")
    words = (run, *LINEAR, "--cache_features", "--output_dir", tmp_path / "out")
    start(linear, *words)
    saved = (tmp_path / "out" / linear.HEAD).read_bytes()
    for message, more in {
        "train_path synthetic:48, this probe has": ("--train_path", "synthetic:49"),
        "is a head with epochs 3, this probe has 4": ("--epochs", "4"),
        "labels are missing": ("--train_path", one),
        "fewer than one global batch of 64": ("--global_batch_size", "64"),
        "is not a multiple of batch_size 8": ("--global_batch_size", "12"),
    }.items():
        assert message in refused(linear, *words, *more)
    both = ("--train_path", two, "--val_path", two)
    assert "is a head with" in refused(linear, *words, *both)
    assert (tmp_path / "out" / linear.HEAD).read_bytes() == saved
    (tmp_path / "out" / linear.HEAD).write_bytes(b"{}")
    assert "is no linear probe's head" in refused(linear, *words)
