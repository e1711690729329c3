"""Fine-tuning as a command: real loaders and engine, resuming, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm.models
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fasthpm import pretrain
from fasthpm.checkpoint.weights import load_weights
from fasthpm.data import build_loader
from fasthpm.probes import finetune, knn
from fasthpm.run.records import read_metrics
from tests.helpers.data_fixtures import image_folder, prepare
from tests.helpers.finetuning import DATA, FLOAT32, SHORT, flat_folder, read, refused, same_weights, start
from tests.helpers.launch import ROOT, check_ranks

TUNE = (
    *DATA,
    "--epochs",
    "2",
    "--warmup_epochs",
    "0.5",
    "--batch_size",
    "8",
    "--global_batch_size",
    "16",
    "--num_workers",
    "1",
    "--log_every",
    "1",
    "--lr",
    "1e-3",
)


@pytest.fixture(scope="module")
def tuned(run: Path) -> Path:
    """A fine-tuning of `run` with everything on: mixing, erasing, drop path, RandAugment, an EMA that is tested."""
    start(finetune, run, *TUNE, *FLOAT32, "--preset", "mae", "--ema_decay", "0.5", "--crop_min", "0.5")
    return run / "finetune"


def test_a_signal_to_the_whole_group_saves_and_ends_well(run: Path, tmp_path: Path) -> None:
    """SLURM signals every process of a job, those that augment too."""
    out = tmp_path / "ft"
    flags = ("--train_path", "synthetic:160", "--val_path", "synthetic:40", "--epochs", "100", "--num_workers", "2")
    sizes = ("--batch_size", "16", "--global_batch_size", "16", "--output_dir", out, "--log_every", "1", *FLOAT32)
    command = [sys.executable, "-m", "fasthpm", "finetune", *map(str, (run, *flags, *sizes))]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "preempted" in output
    assert "Traceback" not in output
    assert list((out / "checkpoints").glob("step-*"))


def test_fine_tuning_resumes_as_if_nothing_had_happened(run: Path, tuned: Path, tmp_path: Path) -> None:
    broken = (
        run,
        *TUNE,
        *FLOAT32,
        "--preset",
        "mae",
        "--ema_decay",
        "0.5",
        "--crop_min",
        "0.5",
        "--output_dir",
        tmp_path / "broken",
    )
    start(finetune, *broken, "--stop_after", "2")
    assert not (tmp_path / "broken" / "result.json").exists()
    start(finetune, *broken)
    assert same_weights(tmp_path / "broken" / "classifier.safetensors", tuned / "classifier.safetensors")
    straight, found = read(tuned / "result.json"), read(tmp_path / "broken" / "result.json")
    assert found["accuracy"] == straight["accuracy"]
    assert straight["effective_epochs"] == 1.0
    assert straight["gpu_hours"] > 0
    assert straight["pretraining_gpu_hours"] > 0
    assert len(straight["checkpoint_hash"]) == 64
    assert straight["versions"]["timm"] == timm.__version__
    assert straight["protocol"] == "fine-tune, 2 epochs"
    assert (tuned / "result.md").read_text().count("\n") == 3


def test_the_classifier_loads_into_timm_and_is_what_was_tested(run: Path, tuned: Path) -> None:
    """timm's model of the file, on the real loader's images, gives the accuracy of result.json; so does --evaluate."""
    path = tuned / "classifier.safetensors"
    with safe_open(path, "pt") as file:
        notes = {name: json.loads(text) for name, text in file.metadata().items()}
    vit = timm.models.VisionTransformer(**notes["timm"]).eval()
    vit.load_state_dict(load_file(path))
    loader = build_loader("synthetic:21", batch_size=21, image_size=(28, 28), channels=1, train=False)
    batch = next(iter(loader))
    loader.close()
    images = (batch.images.permute(0, 3, 1, 2) / 255 - notes["mean"][0]) / notes["std"][0]
    with torch.no_grad():
        hits = (vit(images).argmax(1) == batch.labels).double()
    expected = read(tuned / "result.json")["accuracy"]
    assert 100 * float(hits.mean()) == pytest.approx(expected)
    start(finetune, run, "--evaluate", "--val_path", "synthetic:21", *FLOAT32)
    assert read(tuned / "evaluate" / "result.json")["accuracy"] == pytest.approx(expected)


def test_fine_tuning_learns_and_layers_move_by_their_scale(run: Path, tmp_path: Path) -> None:
    tune = (
        run,
        "--train_path",
        "synthetic:32",
        "--val_path",
        "synthetic:32",
        "--epochs",
        "15",
        "--warmup_epochs",
        "1",
        "--batch_size",
        "16",
        "--global_batch_size",
        "16",
        "--lr",
        "3e-3",
        "--num_workers",
        "1",
        "--crop_min",
        "1",
        "--no-flip",
        "--smoothing",
        "0",
        "--weight_decay",
        "0",
        "--log_every",
        "2",
    )
    start(finetune, *tune, "--output_dir", tmp_path / "ft", "--layer_decay", "0.5", "--eval_every", "15")
    assert read(tmp_path / "ft" / "result.json")["accuracy"] > 12  # 10 by chance
    losses = [record["loss"] for record in read_metrics(tmp_path / "ft")]
    assert losses[-1] < 0.98 * losses[0]
    before, after = load_weights(run)[0].state_dict(), load_file(tmp_path / "ft" / "classifier.safetensors")
    moved = [
        float((after[name] - before[name]).abs().mean()) for name in (f"blocks.{i}.mlp.fc1.weight" for i in (0, 3))
    ]
    assert 0 < moved[0] < 0.3 * moved[1]  # 0.5^4 against 0.5


def test_half_the_tokens_from_scratch_in_another_shape(run: Path, tmp_path: Path) -> None:
    scratch = (run, *TUNE, "--from_scratch", "--epochs", "1", "--output_dir")
    start(finetune, *scratch, tmp_path / "hard", "--token_policy", "hardest", "--keep_tokens", "0.5")
    assert read(tmp_path / "hard" / "result.json")["protocol"] == "from scratch, 1 epochs, 50% hardest tokens"
    start(
        finetune,
        *scratch,
        tmp_path / "wide",
        "--token_policy",
        "random",
        "--input_size",
        "36x20",
        "--global_pool",
        "token",
    )
    shape = load_file(tmp_path / "wide" / "classifier.safetensors")["pos_embed"].shape
    assert shape == (1, 1 + 9 * 5, 128)
    line = refused(finetune, *scratch, tmp_path / "no", "--token_policy", "easiest", "--input_size", "36x20")
    assert "is of images (28, 28), patch 4, 1 channels; the classifier has (36, 20)" in line


def test_two_deepspeed_ranks_fine_tune_under_zero_3(run: Path, tmp_path: Path) -> None:
    """Of few samples, because many CPUs emulate bf16."""
    words = (run, *TUNE, "--epochs", "1", "--output_dir", tmp_path, "--deepspeed_config", "ds_configs/zero3_bf16.json")
    few = ("--train_path", "synthetic:12", "--batch_size", "2", "--global_batch_size", "4")
    check_ranks("fasthpm.probes.finetune", *words, *few)
    found = read(tmp_path / "result.json")
    assert found["versions"]["world_size"] == 2
    assert 0 <= found["accuracy"] <= 100
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_fine_tuning_refuses_what_does_not_fit(run: Path, tuned: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tuned.rglob("*") if path.is_file()}
    same = (*TUNE, *FLOAT32, "--preset", "mae", "--ema_decay", "0.5", "--crop_min", "0.5")
    two = prepare(image_folder(tmp_path / "two", 40, grey=True), tmp_path / "two.beton")
    one = prepare(flat_folder(tmp_path / "one"), tmp_path / "one.beton")
    other, twin = tmp_path / "other", tmp_path / "twin"
    start(pretrain, *SHORT, "--output_dir", twin, "--stop_after", "1", "--seed", "1")
    start(pretrain, *SHORT, "--output_dir", other, "--stop_after", "1", "--model", "hpm_vit_tiny_patch4_28")
    data = ("--train_path", two, "--val_path", two)
    cases: list[tuple[str, Sequence[object]]] = [
        ("the classifier in", (run, *same, *data)),
        ("has 10 classes, the data has 2", (run, *same, *data)),
        ("other settings (epochs 2, here 3)", (run, *same, "--epochs", "3")),
        ("another architecture (embed_dim 128, here 192", (other, *same, "--output_dir", tuned)),
        ("holds a fine-tuned classifier; give the pretraining run", (tuned, *same)),
        ("has 1 class (one), expected 2 or more; labels are missing", (run, *same, "--train_path", one)),
        ("has 10 classes, ", (run, *same, "--val_path", two)),
        ("--val_path is missing", (run, "--train_path", two)),
        ("token_policy is 'hard', expected one of random", (run, *same, "--token_policy", "hard")),
        ("did you mean '--mixup'", (run, *same, "--mixupp", "1")),
        ("the classifier in", (run, "--evaluate", "--val_path", two)),
        ("is of another architecture", (other, "--evaluate", "--val_path", "synthetic:21", "--output_dir", tuned)),
        ("holds no fine-tuned classifier", (run, "--evaluate", *DATA, "--output_dir", tmp_path / "none")),
        ("holds checkpoints of another kind", (run, *same, "--output_dir", run)),
        (f"came from {run} (checkpoint ", (twin, "--evaluate", "--val_path", "synthetic:21", "--output_dir", tuned)),
        (f"the run given is {twin} (", (twin, *same, "--output_dir", tuned)),
        ("--epochs is 3, and the classifier in", (run, "--evaluate", *DATA, "--epochs", "3")),
        ("--preset small has aa '', and the classifier in", (run, "--evaluate", *DATA, "--preset", "small")),
        ("--train_path is 'elsewhere', and the", (run, "--evaluate", *DATA, "--train_path", "elsewhere")),
        ("--evaluate tests the newest checkpoint", (run, "--evaluate", *DATA, "--resume", tuned)),
    ]
    for message, words in cases:
        assert message in refused(finetune, *words)
    assert {path: path.stat().st_mtime_ns for path in tuned.rglob("*") if path.is_file()} == before
    assert "fine-tuned classifier" in refused(knn, tuned, *DATA)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--difficulty_run", "x"), "--difficulty_run has no effect here: only --token_policy easiest or hardest asks"),
        (("--token_policy", "random", "--token_difficulty", "paper"), "--token_difficulty has no effect here: only"),
        (("--keep_tokens", "0.3"), "--keep_tokens has no effect here: without --token_policy all patches are seen"),
        (("--lr", "1e-3", "--blr", "1e-3"), "--blr has no effect here: --lr gives the learning rate itself"),
        (("--frame_sampling", "dense"), "--frame_sampling has no effect here: {run} was trained on images; leave it"),
        (("--sampling_rate", "2"), "--sampling_rate has no effect here: {run} was trained on images; leave it out"),
        (("--preset", "mae", "--color_jitter", "0.2"), "--color_jitter has no effect here: aa is rand-m9-mstd0.5-inc1"),
    ],
)
def test_flags_without_effect_are_refused(run: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    more = ("--batch_size", "8", "--global_batch_size", "16", "--output_dir", tmp_path / "out")
    assert said.format(run=run) in refused(finetune, run, *DATA, *more, *words)
    assert not (tmp_path / "out").exists()
