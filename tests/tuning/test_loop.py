"""Updates of a tuning: what they draw from, when they test, and what the log says of them."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasthpm import recipes, schedule
from fasthpm.data.sampling import torch_seed
from fasthpm.errors import UserError
from fasthpm.probes.finetune.building import FineTuning
from fasthpm.probes.finetune.settings import FineTune
from fasthpm.ranks.launch import Launch
from fasthpm.recipe import Recipe
from fasthpm.run.records import read_metrics
from fasthpm.tuning import loop


class Quiet:
    """A watchdog that watches nothing, and remembers how long updates were given."""

    def __init__(self) -> None:
        self.given: list[float] = []

    def doing(self, phase: str, timeout: float = 0.0) -> contextlib.AbstractContextManager[None]:
        self.given += [timeout] if "testing" in phase else []
        return contextlib.nullcontext()

    def progressed(self, update: int) -> None:
        pass


def plan_of(**changes: Any) -> Recipe:
    """3 updates per epoch, 3 epochs, two micro-steps each."""
    values: dict[str, Any] = {"batch_size": 8, "global_batch_size": 16, "epochs": 3, "warmup_epochs": 1.0, "lr": 1e-3}
    return Recipe(**{**vars(recipes.debug()), **values, **changes}).resolve(48, 1)


def seeds_drawn(monkeypatch: pytest.MonkeyPatch, *, rank: int = 0, done: int = 0, seed: int = 0) -> list[int]:
    """What the random numbers of every micro-step are seeded with, from update `done` to the end."""
    drawn: list[int] = []
    monkeypatch.setattr(loop, "seed_all", lambda *parts: drawn.append(torch_seed(*parts)))
    monkeypatch.setattr(loop, "after_update", lambda run, log, last: None)
    monkeypatch.setattr(loop.ranks, "set_lr", lambda engine, lr: None)
    batch = SimpleNamespace(ids=(), to=lambda device: batch)
    engine: Any = SimpleNamespace(backward=lambda loss: None, step=lambda: None)
    run: Any = SimpleNamespace(
        recipe=plan_of(),
        settings=FineTune(seed=seed),
        launch=Launch(rank, rank, 2, 1, torch.device("cpu")),
        loader=[batch] * 99,
        engine=lambda *inputs: torch.zeros(()),
        inputs=lambda batch: (),
        losses=lambda output: {"loss": output},
        lr_at=lambda update: 0.0,
        testing_due=lambda: run.done == 4,
        done=done,
        preempted=False,
    )
    run.engine.backward, run.engine.step = engine.backward, engine.step
    nothing = contextlib.nullcontext
    progress = SimpleNamespace(update=lambda: None)
    log: Any = SimpleNamespace(add=lambda losses, count: None, waiting_for_data=nothing, progress=progress)
    watchdog: Any = Quiet()
    loop.train(run, log, SimpleNamespace(agreed=lambda: False), watchdog)  # type: ignore[arg-type]
    assert run.done == 9
    assert watchdog.given == [loop.LONG_SECONDS if at in (4, 9) else 0.0 for at in range(done + 1, 10)]  # tests alone
    return drawn


def test_every_micro_step_of_every_rank_draws_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """By numbers that a resumed run draws again."""
    zero, one = (seeds_drawn(monkeypatch, rank=rank) for rank in (0, 1))
    assert len(zero) == len(one) == 18
    assert len({*zero, *one, *seeds_drawn(monkeypatch, seed=1)}) == 54
    assert seeds_drawn(monkeypatch, done=5) == zero[10:]


def steps_at(every: int) -> Any:
    """Hooks of a fine-tuning that is tested every so many epochs and never saves."""
    run: Any = SimpleNamespace(recipe=plan_of(log_every=2), settings=FineTune(eval_every=every), preempted=False)
    run.test = lambda: {"accuracy": 1.0}
    run._ends_epoch = lambda of: FineTuning._ends_epoch(run, of)
    run.testing_due = lambda: FineTuning.testing_due(run)
    run.saving_due = lambda: False
    return run


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_last_update_is_always_tested(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    monkeypatch.setattr(loop.state, "save", lambda run: None)
    tested: list[int] = []
    log: Any = SimpleNamespace(read=lambda run, test: tested.append(run.done) if test() else None)
    run = steps_at(every)
    for run.done in range(1, 10):
        loop.after_update(run, log, 9)
    assert tested == {1: [3, 6, 9], 2: [6, 9], 5: [9]}[every]


def test_the_last_update_and_a_stopped_one_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(loop.state, "save", lambda run: saved.append(run.done))
    log: Any = SimpleNamespace(read=lambda run, test: None)
    run = steps_at(1)
    for run.done in range(1, 10):
        run.preempted = run.done == 4
        loop.after_update(run, log, 9)
    assert saved == [4, 9]


def logging(tmp_path: Path) -> tuple[Any, loop.Log]:
    run: Any = SimpleNamespace(launch=Launch(0, 0, 1, 1, torch.device("cpu")), recipe=plan_of(), done=0, best=0.0)
    run.name, run.figure, run.settings = "finetune", "accuracy", FineTune()
    run.lr_at = lambda update: schedule.lr_at(run.recipe, update)
    run.told = lambda: {"bad_samples": 3.0}
    run.line = lambda epoch, record: f"epoch {epoch}"
    return run, loop.Log(run, tmp_path)


def test_a_record_is_of_the_updates_since_the_last(tmp_path: Path) -> None:
    run, log = logging(tmp_path)
    for losses, run.done in (([1.0, 2.0, 6.0], 2), ([5.0], 3)):
        for value in losses:
            log.add({"loss": torch.tensor(value), "loss_mask": torch.tensor(value / 2)}, 8)
        found = {"accuracy": 10.0 * run.done} if run.done == 2 else {}
        log.read(run, lambda found=found: found)
    log.close()
    records = read_metrics(tmp_path)
    assert [(record["step"], record["loss"], record["loss_mask"]) for record in records] == [(2, 3.0, 1.5), (3, 5, 2.5)]
    assert [record["lr"] for record in records] == [schedule.lr_at(run.recipe, step) for step in (1, 2)]
    assert records[0]["images_per_second"] * records[0]["seconds"] == pytest.approx(24)
    assert records[0]["bad_samples"] == 3.0
    assert 0 <= records[0]["data_wait"] < 1
    assert run.best == 20.0


def test_a_loss_that_is_not_finite_ends_the_tuning_in_one_line(tmp_path: Path) -> None:
    run, log = logging(tmp_path)
    log.add({"loss": torch.tensor(float("nan"))}, 8)
    run.done = 1
    with pytest.raises(UserError, match="not finite by update 1; lower --blr"):
        log.read(run, dict)
    log.close()
