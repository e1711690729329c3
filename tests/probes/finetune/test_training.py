"""Updates of fine-tuning."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup

from fasthpm import recipes, schedule
from fasthpm.probes.finetune import training
from fasthpm.probes.finetune.settings import FineTune
from fasthpm.ranks.launch import Launch
from fasthpm.recipe import Recipe
from fasthpm.run.records import read_metrics


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_the_frames_of_a_clip_are_mixed_alike(cutmix: float) -> None:
    clips, labels = torch.randn(4, 3, 5, 8, 8), torch.tensor([0, 1, 2, 0])
    mix = Mixup(0.8 * (not cutmix), cutmix, label_smoothing=0.1, num_classes=3)
    np.random.seed(5)  # noqa: NPY002
    got, targets = training.mixed(mix, clips.clone(), labels)
    assert not torch.equal(got, clips)
    for t in range(5):
        np.random.seed(5)  # noqa: NPY002
        frames, same = mix(clips[:, :, t].clone(), labels)
        assert torch.equal(got[:, :, t], frames)
        assert torch.equal(targets, same)


def test_where_mixing_is_off_labels_are_smoothed() -> None:
    mix = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=4)
    mix.mixup_enabled = False
    images, labels = torch.randn(2, 1, 4, 4), torch.tensor([3, 0])
    got, targets = training.mixed(mix, images, labels)
    assert torch.equal(got, images)
    want = torch.tensor([[0.025, 0.025, 0.025, 0.925], [0.925, 0.025, 0.025, 0.025]])
    torch.testing.assert_close(targets.cpu(), want)


def plan_of(**changes: Any) -> Recipe:
    """3 updates per epoch, 3 epochs, two micro-steps each."""
    values: dict[str, Any] = {"batch_size": 8, "global_batch_size": 16, "epochs": 3, "warmup_epochs": 1.0, "lr": 1e-3}
    return Recipe(**{**vars(recipes.debug()), **values, **changes}).resolve(48, 1)


def seeds_drawn(monkeypatch: pytest.MonkeyPatch, *, rank: int = 0, done: int = 0, seed: int = 0) -> list[int]:
    """What the random numbers of every micro-step are seeded with, from update `done` to the end."""
    drawn: list[int] = []
    monkeypatch.setattr(training, "seed_all", lambda *parts: drawn.append(training.result.torch_seed(*parts)))
    monkeypatch.setattr(training, "mixed", lambda mix, images, labels: (images, labels))
    monkeypatch.setattr(training, "after_update", lambda run, log, last: None)
    monkeypatch.setattr(training.ranks, "set_lr", lambda engine, lr: None)

    class Engine:
        def __call__(self, images: Any, targets: Any) -> Any:
            return torch.zeros(())

        def backward(self, loss: Any) -> None:
            pass

        def step(self) -> None:
            pass

    batch = SimpleNamespace(images=None, labels=(), to=lambda device: batch)
    run: Any = SimpleNamespace(
        recipe=plan_of(),
        settings=FineTune(seed=seed),
        launch=Launch(rank, rank, 2, 1, torch.device("cpu")),
        info=SimpleNamespace(classes=("a", "b")),
        loader=[batch] * 99,
        engine=Engine(),
        done=done,
        preempted=False,
    )
    log: Any = SimpleNamespace(add=lambda loss, count: None, progress=SimpleNamespace(update=lambda: None))
    stop: Any = SimpleNamespace(agreed=lambda: False)
    training.train(run, log, stop)
    assert run.done == 9
    return drawn


def test_every_micro_step_of_every_rank_mixes_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """By numbers that a resumed run draws again."""
    zero, one = (seeds_drawn(monkeypatch, rank=rank) for rank in (0, 1))
    assert len(zero) == len(one) == 18
    assert len({*zero, *one, *seeds_drawn(monkeypatch, seed=1)}) == 54
    assert seeds_drawn(monkeypatch, done=5) == zero[10:]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_last_update_is_always_tested(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    monkeypatch.setattr(training, "evaluate", lambda run: {"accuracy": 1.0})
    monkeypatch.setattr(training.state, "save", lambda run: None)
    tested: list[int] = []
    log: Any = SimpleNamespace(read=lambda run, found: tested.append(run.done) if found else None)
    run: Any = SimpleNamespace(recipe=plan_of(log_every=2), settings=FineTune(eval_every=every), preempted=False)
    for run.done in range(1, 10):
        training.after_update(run, log, 9)
    assert tested == {1: [3, 6, 9], 2: [6, 9], 5: [9]}[every]


def test_a_record_is_of_the_updates_since_the_last(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(launch=Launch(0, 0, 1, 1, torch.device("cpu")), recipe=plan_of(), done=0, best=0.0)
    log = training.Log(run, tmp_path)
    for losses, run.done in (([1.0, 2.0, 6.0], 2), ([5.0], 3)):
        for value in losses:
            log.add(torch.tensor(value), 8)
        log.read(run, {"accuracy": 10.0 * run.done} if run.done == 2 else {})
    log.close()
    records = read_metrics(tmp_path)
    assert [(record["step"], record["loss"]) for record in records] == [(2, 3.0), (3, 5.0)]
    assert [record["lr"] for record in records] == [schedule.lr_at(run.recipe, step) for step in (1, 2)]
    assert records[0]["images_per_second"] * records[0]["seconds"] == pytest.approx(24)
    assert run.best == 20.0
