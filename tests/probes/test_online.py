"""The online probe beside a training."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from fasthpm import pretrain
from fasthpm.run.records import read_metrics
from tests.helpers.finetuning import SHORT, refused, same_weights, start


def test_online_probe_leaves_training_as_it_is(tmp_path: Path) -> None:
    """Bit for bit, beside a run of the same moment: late in a long test process, one made early was seen to differ in
    the last bit."""
    run = tmp_path / "run"
    start(pretrain, *SHORT, "--output_dir", run)
    online = ("--online_probe_every", "1", "--online_knn_every", "1", "--output_dir", tmp_path / "online")
    start(pretrain, *SHORT, *online, "--stop_after", "2")
    head = tmp_path / "online" / "online_probe.safetensors"
    stopped = load_file(head)
    start(pretrain, *SHORT, *online)
    assert same_weights(run / "encoder.safetensors", tmp_path / "online" / "encoder.safetensors")
    straight, probed = read_metrics(run), read_metrics(tmp_path / "online")
    assert [record["loss"] for record in straight] == [record["loss"] for record in probed]
    assert {"probe_accuracy", "probe_loss"} <= probed[0].keys()
    assert "knn_accuracy" in probed[-1]
    assert "probe_accuracy" not in straight[0]
    assert not torch.equal(stopped["linear.weight"], load_file(head)["linear.weight"])
    zero3 = ("--deepspeed_config", "ds_configs/zero3_bf16.json", "--output_dir", tmp_path / "zero3")
    assert "use ZeRO 0, 1 or 2" in refused(pretrain, *SHORT, *online, *zero3)
    shutil.rmtree(tmp_path / "online")
