"""A whole run on video files, and what reads it."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fasthpm.__main__ import dispatch
from fasthpm.run.metrics import overview_tag
from fasthpm.run.records import read_metrics
from tests.helpers.launch import ROOT, check_ranks
from tests.helpers.video_fixtures import prepare_videos, video_folder


def test_a_video_run_from_pretraining_to_pictures_and_probes(tmp_path: Path) -> None:
    """Two updates on two ranks under ZeRO-3 with activation checkpointing, on prepared videos, as one rank makes them;
    then pictures, k-NN and, on two ranks again, a fine-tuning tested over several views."""
    run, one = tmp_path / "run", tmp_path / "one"
    videos = prepare_videos(video_folder(tmp_path / "videos", 9), tmp_path / "set")
    flags = (
        *("--recipe", "hpm_video_demo", "--model", "hpm_vit_pico_patch8_32_video", "--data_path", videos),
        *("--channels", 3, "--input_size", 12, "--sampling_rate", 1, "--tubelet_size", 2),
        *("--decoder_depth", 1, "--decoder_dim", 32, "--activation_checkpointing"),
        *("--global_batch_size", 4, "--epochs", 1, "--warmup_epochs", 0, "--log_every", 1),
    )
    zero3, zero1 = (
        ("--deepspeed_config", ROOT / "ds_configs" / f"{name}.json") for name in ("zero3_bf16", "zero1_bf16")
    )
    check_ranks("fasthpm.pretrain", *flags, *zero3, "--batch_size", 2, "--output_dir", run, launcher="forked")
    dispatch(["pretrain", *map(str, (*flags, *zero1, "--batch_size", 4, "--output_dir", one, "--panel_every", 0))])
    # The ranks' shares make up the batch of one: halves of other samples would differ by much more.
    for ours, theirs in zip(read_metrics(run), read_metrics(one), strict=True):
        assert ours["reconstruction_loss"] == pytest.approx(theirs["reconstruction_loss"], rel=0.01)
    assert {path.suffix for path in (run / "panels").iterdir()} == {".png", ".gif"}
    assert (run / "model.safetensors").is_file()
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {overview_tag("clips"), "clips"} <= set(events.Tags()["images"])
    images = events.Images("clips")
    assert images[-1].encoded_image_string[:4] == b"GIF8"
    for name in ("x.png", "x.gif"):
        dispatch(["visualize", str(run), "--num_images", "2", "-o", str(tmp_path / name)])
        assert (tmp_path / name).read_bytes()[:4] == {"x.png": b"\x89PNG", "x.gif": b"GIF8"}[name]
    paths = ("--train_path", videos, "--val_path", videos, "--batch_size", 4)
    dispatch(["knn", str(run), *map(str, paths), "--weights", "untrained", "student"])
    assert json.loads((run / "knn_student_mean.json").read_text())["pool"] == "mean"
    assert (run / "knn_untrained_mean.json").is_file()
    # Nine test videos: the second rank has a batch less.
    tune = ("--epochs", 1, "--global_batch_size", 8, "--test_views", "2x3", *zero3)
    check_ranks("fasthpm.probes.finetune", run, *paths, *tune, launcher="forked")
    found = json.loads((run / "finetune" / "result.json").read_text())
    assert (found["protocol"], found["versions"]["world_size"]) == ("fine-tune, 1 epochs, 2x3 views", 2)
    assert found["accuracy"] * 9 / 100 == pytest.approx(round(found["accuracy"] * 9 / 100))
