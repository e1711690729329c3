"""What segmentation and detection share, by a toy task: training, resuming, evaluating, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasthpm.dense import command
from fasthpm.dense.results import DenseResult
from fasthpm.errors import UserError
from fasthpm.ranks import launch
from fasthpm.run.records import read_metrics
from tests.helpers.dense_toy import TASK
from tests.helpers.finetuning import read, same_weights
from tests.helpers.launch import ROOT, check_ranks

TOY = ROOT / "tests" / "helpers" / "dense_toy.py"
FLOAT32 = ("--deepspeed_config", "ds_configs/zero1_fp32.json")


def start(run: Path, *words: object) -> DenseResult:
    return command.main(TASK, [str(run), *map(str, words), *FLOAT32])


def refused(run: Path, *words: object) -> str:
    try:
        with pytest.raises(UserError) as caught:
            start(run, *words)
    finally:
        launch.finish()  # a process would end here
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def trained(run: Path) -> Path:
    found = start(run, "--data_path", "toy:40")
    assert found.finished
    return run / "toy"


def test_it_trains_tests_draws_and_writes_what_it_found(trained: Path) -> None:
    result = read(trained / "result.json")
    assert result["accuracy"] == result["best_accuracy"] == 100.0
    assert result["protocol"] == "toy, 12 updates of 8"
    assert result["classes"][1] == {"class": "right", "accuracy": None}
    assert 0 <= result["data_wait"] <= 1
    assert result["checkpoint_hash"]
    assert "| left | 1.00 |\n| right |  |" in (trained / "result.md").read_text()
    assert (trained / "pictures.png").read_text() == "8"
    records = read_metrics(trained)
    assert [record["step"] for record in records if "accuracy" in record] == [4, 8, 12]
    assert records[0]["loss"] == pytest.approx(records[0]["sides"] + records[0]["size"], rel=1e-6)
    tensors = load_file(trained / "network.safetensors")
    assert int(tensors["norm.num_batches_tracked"]) == 24
    assert {"head.weight", "norm.running_var", "patch_embed.proj.weight"} < tensors.keys()


def test_a_second_run_repeats_the_result_and_trains_nothing(run: Path, trained: Path) -> None:
    before = (trained / "network.safetensors").read_bytes()
    assert start(run, "--data_path", "toy:40").figures["accuracy"] == 100.0
    assert (trained / "network.safetensors").read_bytes() == before


def test_evaluate_tests_what_is_there(run: Path, trained: Path) -> None:
    found = start(run, "--data_path", "toy:40", "--evaluate", "--pictures", 3)
    assert found.figures["accuracy"] == 100.0
    assert (trained / "evaluate" / "pictures.png").read_text() == "3"


def test_only_the_run_that_it_came_from_is_given_the_credit(run: Path, trained: Path, tmp_path: Path) -> None:
    """Also where it was moved; in a test as in a training that goes on."""
    twin, words = tmp_path / "twin", ("--data_path", "toy:40", "--output_dir", trained)
    shutil.copytree(run / "checkpoints", twin / "checkpoints")
    assert start(twin, *words, "--evaluate").finished
    assert read(trained / "evaluate" / "result.json")["run"] == str(twin)
    manifest = next(twin.glob("checkpoints/*/manifest.json"))
    manifest.write_text(json.dumps(read(manifest), indent=1))  # another hash
    before = (trained / "result.json").read_bytes()
    for more in (("--evaluate",), ()):
        said = refused(twin, *words, *more)
        assert f"came from {run} (checkpoint " in said
        assert f"the run given is {twin} (" in said
    assert (trained / "result.json").read_bytes() == before


def test_stopped_and_resumed_it_ends_with_the_same_bits(run: Path, trained: Path, tmp_path: Path) -> None:
    words = ("--data_path", "toy:40", "--output_dir", tmp_path / "out")
    assert not start(run, *words, "--stop_after", 7).finished
    assert start(run, *words).finished
    assert same_weights(tmp_path / "out" / "network.safetensors", trained / "network.safetensors")


def test_two_ranks_resume_with_the_same_bits(run: Path, tmp_path: Path) -> None:
    """Each with its own share; the statistics of batch norms are rank 0's."""
    words = (run, "--data_path", "toy:40", "--global_batch_size", 4, *FLOAT32, "--output_dir")
    check_ranks(TOY, *words, tmp_path / "whole", ranks=2, launcher="forked")
    check_ranks(TOY, *words, tmp_path / "parts", "--stop_after", 5, ranks=2, launcher="forked")
    check_ranks(TOY, *words, tmp_path / "parts", ranks=2, launcher="forked")
    assert same_weights(tmp_path / "whole" / "network.safetensors", tmp_path / "parts" / "network.safetensors")


def test_bad_samples_are_replaced_counted_and_listed(run: Path, tmp_path: Path) -> None:
    assert start(run, "--data_path", "toy-bad:40", "--output_dir", tmp_path / "out").finished
    assert read_metrics(tmp_path / "out")[-1]["bad_samples"] == 1
    assert "toy-bad:40/3,is torn" in (tmp_path / "out" / "bad_samples.csv").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data_path", "toy:4"), "has 4 samples for training, fewer than the 8 of an update"),
        (("--data_path", "toy:40", "--recipe", "toy_smal"), "unknown recipe 'toy_smal'"),
        (("--data_path", "toy:40", "--lr_schedule", "cosine"), "lr_schedule is 'cosine', expected one of poly, steps"),
        (("--data_path", "toy:40", "--milestones", "0.9,0.2"), "expected rising shares"),
        (("--data_path", "toy:40", "--stepz", "3"), "unknown argument '--stepz'"),
        (("--data_path", "toy:40", "--output_dir", "{run}"), "holds checkpoints of another kind"),
        (("--data_path", "toy:40", "--lr", "0.01"), "belongs to a toy with other settings (lr 0.05, here 0.01)"),
        (("--data_path", "toy:44"), "with other settings (data_path 'toy:40', here 'toy:44')"),
        (("--data_path", "toy:40", "--evaluate", "--output_dir", "{run}"), "holds no network of fasthpm toy"),
        (("--data_path", "toy:40", "--evaluate", "--output_dir", "{tmp}"), "holds no checkpoint; train first"),
        (("--data_path", "toy:40", "--weights", "teacher"), "(weights 'student', here 'teacher')"),
    ],
)
def test_wrong_input_is_one_line(run: Path, trained: Path, tmp_path: Path, words: Any, said: str) -> None:
    assert said in refused(run, *(str(word).format(run=run, tmp=tmp_path) for word in words))


def test_the_encoder_learns_slower_the_deeper_and_positions_do_not_decay() -> None:
    from fasthpm.dense.tuning import parameter_groups

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
            self.rel_pos_h, self.head = torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Linear(2, 2)

        def encoder_name(self, name: str) -> str:
            return name if name.startswith("blocks") else ""

    net = Net()
    found = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(net, 2, 0.5, 0.1)
        for parameter in group["params"]
    }
    assert found[id(net.blocks[0].weight)] == (0.25, 0.1)
    assert found[id(net.blocks[1].weight)] == (0.5, 0.1)
    assert found[id(net.blocks[1].bias)] == (0.5, 0.0)
    assert found[id(net.head.weight)] == (1.0, 0.1)
    assert found[id(net.rel_pos_h)] == (1.0, 0.0)
