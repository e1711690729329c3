"""Fine-tuning, linear probe and multi-view tests of video runs, through the real loaders and the engine."""

from pathlib import Path

import pytest
import torch

from fasthpm.data import build_loader
from fasthpm.probes import finetune, linear
from fasthpm.probes.classifier import load_classifier
from fasthpm.probes.finetune import command
from tests.helpers.finetuning import FLOAT32, read, refused, same_weights, start
from tests.helpers.videos import video_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video run's folder: 8 frames of 16 x 16 in slots of 2, patches of 8."""
    return video_run(tmp_path_factory.mktemp("run") / "run", flip=False)[0]


def words(videos: Path, *more: object) -> tuple[object, ...]:
    """Everything on: repeats, RandAugment, mixing, erasing, drop path."""
    return (
        "--train_path",
        videos,
        "--val_path",
        videos,
        "--epochs",
        "2",
        "--warmup_epochs",
        "0",
        "--batch_size",
        "4",
        "--global_batch_size",
        "8",
        "--num_sample",
        "2",
        "--lr",
        "0.02",
        "--mixup",
        "0.8",
        "--cutmix",
        "1",
        "--reprob",
        "0.25",
        "--drop_path",
        "0.1",
        "--aa",
        "rand-m7-n4-mstd0.5-inc1",
        "--num_workers",
        "1",
        "--log_every",
        "1",
        "--test_views",
        "2x3",
        *FLOAT32,
        *more,
    )


def view_by_view(folder: Path, val: Path, views: tuple[int, int]) -> tuple[float, float]:
    """Accuracy and loss of the written classifier, one view at a time: the slow twin of the batched test."""
    vit, notes = load_classifier(folder / command.CLASSIFIER_FILE)
    mean, std = (torch.tensor(notes[name])[:, None, None, None] for name in ("mean", "std"))
    rows = views[0] * views[1]
    loader = build_loader(val, batch_size=1, image_size=(16, 16), channels=3, train=False, num_frames=8, views=views)
    hits, losses = [], []
    for batch in loader:
        logits = torch.zeros(len(notes["classes"]))
        for pixels in batch.images:
            clip = (pixels.permute(3, 0, 1, 2).float() / 255 - mean) / std
            with torch.no_grad():
                logits += vit(clip[None])[0] / rows
        hits.append(float(logits.argmax() == batch.labels[0]))
        losses.append(float(-logits.log_softmax(0)[batch.labels[0]]))
    loader.close()
    return 100 * sum(hits) / len(hits), sum(losses) / len(losses)


def test_a_fine_tuning_of_videos_resumes_and_is_tested_over_views(run: Path, videos: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(finetune, run, *words(videos, "--output_dir", whole))
    start(finetune, run, *words(videos, "--output_dir", broken, "--stop_after", "1"))
    start(finetune, run, *words(videos, "--output_dir", broken))
    assert same_weights(whole / "classifier.safetensors", broken / "classifier.safetensors")
    found = read(whole / "result.json")
    assert found["protocol"] == "fine-tune, 2 epochs, 2x3 views"
    assert (found["settings"]["flip"], found["settings"]["layer_decay"]) == (False, 0.75)
    evaluate = (
        "--evaluate",
        "--val_path",
        videos,
        "--batch_size",
        "7",
        "--output_dir",
        whole,
    )  # 7: batches of one video
    once = view_by_view(whole, videos, (1, 1))
    for views, (accuracy, loss) in {"2x3": view_by_view(whole, videos, (2, 3)), "1x1": once}.items():
        start(finetune, run, *evaluate, "--test_views", views)
        tested = read(whole / "evaluate" / "result.json")
        assert tested["accuracy"] == pytest.approx(accuracy)
        assert tested["val_loss"] == pytest.approx(loss, rel=1e-4)
        if views == "2x3":
            assert found["accuracy"] == tested["accuracy"]
            assert found["val_loss"] == pytest.approx(tested["val_loss"], rel=1e-4)
            assert abs(tested["val_loss"] - once[1]) > 1e-3 * once[1]


def test_a_linear_probe_on_clips(run: Path, videos: Path, tmp_path: Path) -> None:
    paths = ("--train_path", videos, "--val_path", videos)
    flags = (run, *paths, "--epochs", "2", "--batch_size", "4", "--global_batch_size", "4", "--output_dir")
    for name, more in {"augmented": (), "cached": ("--cache_features",)}.items():
        start(linear, *flags, tmp_path / name, *more)
        found = read(tmp_path / name / "result.json")
        assert found["settings"]["pool"] == "mean"
        assert 0 <= found["accuracy"] <= 100
    assert "video models have no cls token" in refused(linear, *flags, tmp_path / "no", "--pool", "cls")


def test_what_does_not_fit_videos_is_refused(run: Path, videos: Path, tmp_path: Path) -> None:
    cases = {
        "--token_policy takes image models": ("--token_policy", "random"),
        "preset mae is not for videos": ("--preset", "mae"),
        "video models have no cls token": ("--global_pool", "token"),
        "test_views is '5', expected clips x crops": ("--test_views", "5"),
        "frame_sampling is 'sparse', expected one of dense, segments": ("--frame_sampling", "sparse"),
        "num_sample is 0, expected 1 or more": ("--num_sample", "0"),
        "holds no prepared videos": ("--train_path", "README.md/.."),
    }
    for message, more in cases.items():
        assert message in refused(finetune, run, *words(videos, "--output_dir", tmp_path / "out", *more)), message
    assert not (tmp_path / "out").exists()
    odd = words(videos, "--num_sample", "1", "--batch_size", "1")
    assert "mixup and cutmix pair" in refused(finetune, run, *odd)
