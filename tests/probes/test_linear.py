"""The linear probe as a command: real loaders and engine, resuming, and what it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fasthpm.dense import probe
from fasthpm.dense import settings as dense_settings
from fasthpm.dense.settings import Dense
from fasthpm.probes import linear, result
from fasthpm.probes.finetune import settings as finetune_settings
from fasthpm.ranks import Launch
from tests.helpers.data_fixtures import image_folder, prepare
from tests.helpers.finetuning import DATA, flat_folder, read, refused, same_weights, start
from tests.helpers.launch import check_ranks

LAUNCH = Launch(0, 0, 1, 1, torch.device("cpu"))
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--cache_features", "--crop_min", "0.3"),
            "--crop_min has no effect here: --cache_features takes the features",
        ),
        (("--lr", "0.1", "--blr", "0.1"), "--blr has no effect here: --lr gives the learning rate itself"),
        (("--warmup_epochs", "-3"), "warmup_epochs is -3.0, expected 0 or more"),
        (("--global_batch_size", "-32"), "global_batch_size is -32, expected 0 or more"),
        (("--stop_after_epoch", "-1"), "stop_after_epoch is -1, expected 0 or more"),
        (("--crop_min", "0"), "crop_min is 0.0, expected more than 0, at most 1"),
        (("--lr", "-1"), "lr is -1.0, expected 0 or more"),
        (("--blr", "-1"), "blr is -1.0, expected 0 or more"),
        (("--save_every", "0"), "save_every is 0, expected 1 or more"),
    ],
)
def test_idle_flags_and_wrong_numbers_are_one_line(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refused(linear, tmp_path / "run", *DATA, *words)


def test_a_checkpoint_named_from_within_its_folder_has_its_results_beside_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = next((run / "checkpoints").iterdir())
    for place, name in ((run, "."), (folder.parent, folder.name), (folder, ".")):
        monkeypatch.chdir(place)
        found = [
            Path(linear.parse_arguments([name, *DATA]).output_dir).resolve().parent,
            Path(finetune_settings.complete(finetune_settings.FineTune(), Path(name)).output_dir).resolve().parent,
            Path(dense_settings.complete(Dense(), Path(name), "segment").output_dir).resolve().parent,
            probe.folder_of(Path(name), probe.DenseProbe()).resolve().parent,
        ]
        assert found == [run] * 4
        hours = [result.provenance(Path(one), LAUNCH)["pretraining_gpu_hours"] for one in (name, run)]
        assert hours[0] == hours[1] > 0
