"""The training loop of a fine-tuning, and its log."""

import time
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from fasthpm import checkpoint, ranks, schedule
from fasthpm.errors import UserError
from fasthpm.probes import result
from fasthpm.probes.finetune.building import FineTuning
from fasthpm.probes.finetune.testing import evaluate, seed_all
from fasthpm.ranks.signals import StopSignals
from fasthpm.run import state
from fasthpm.run.journal import Journal
from fasthpm.run.metrics import wait_for

CLASSIFIER_FILE = "classifier.safetensors"


# -------------------------------------------------------------------------------------------------- training
def train(run: FineTuning, log: "Log", stop: StopSignals) -> None:
    """The loop: batch, mix, step, test, save; until the last update, or the one at which the ranks agree to stop."""
    plan, settings, device = run.recipe, run.settings, run.launch.device
    last = min(plan.total_steps, plan.stop_after or plan.total_steps)
    classes = len(run.info.classes)
    mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)
    mix.mixup_enabled = settings.mixes
    batches = iter(run.loader)
    while run.done < last and not run.preempted:
        ranks.set_lr(run.engine, schedule.lr_at(plan, run.done))
        for micro_step in range(plan.accum_iter):
            batch = next(batches).to(device)
            seed_all(settings.seed, run.done, micro_step, run.launch.rank)
            images, targets = mixed(mix, batch.images, batch.labels)
            loss = run.engine(images, targets)
            run.engine.backward(loss)
            run.engine.step()
            log.add(loss, len(batch.labels))
        run.done += 1
        run.preempted = stop.agreed()
        log.progress.update()
        after_update(run, log, last)


def mixed(mix: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] or clips [B, C, T, H, W] and labels [B] -> mixed, soft targets [B, K]; only smoothed where
    mixing is off. The frames of a clip are mixed alike: they are to timm channels of one image."""
    if mix.mixup_enabled:
        flat, targets = mix(images.flatten(1, -3), labels)
        return flat.reshape(images.shape), targets
    return images, mixup_target(labels, mix.num_classes, smoothing=mix.label_smoothing)


def after_update(run: FineTuning, log: "Log", last: int) -> None:
    """Log, test and save, each at its own interval, and all of them at the end."""
    plan, epoch_length = run.recipe, run.recipe.steps_per_epoch
    ending, (epoch, rest) = run.done == last, divmod(run.done, epoch_length)
    testing = run.done == plan.total_steps or (rest == 0 and epoch % run.settings.eval_every == 0)
    saving = ending or run.preempted or (rest == 0 and epoch % plan.save_every == 0)
    if run.done % plan.log_every == 0 or testing or saving:
        log.read(run, evaluate(run) if testing else {})
    if saving:
        state.save(run)


# -------------------------------------------------------------------------------------------------- logging
class Log(Journal):
    """Loss and accuracy: summed on the device, written to the fine-tuning's journal."""

    def __init__(self, run: FineTuning, folder: Path) -> None:
        rank, total = run.launch.rank, run.recipe.total_steps
        super().__init__(folder, "finetune", rank=rank, total_steps=total, first_step=run.done)
        self.world_size, self.device = run.launch.world_size, run.launch.device
        self._sum, self._count, self._samples, self._begin = torch.zeros(()), 0, 0, 0.0
        self._restart()

    def add(self, loss: Tensor, samples: int) -> None:
        """Take in one micro-step, without waiting for it."""
        self._sum = self._sum + loss.detach().double()
        self._count, self._samples = self._count + 1, self._samples + samples

    def read(self, run: FineTuning, tested: dict[str, float]) -> None:
        """Average over ranks since the last reading and write it. Collective.

        **Raises:** `UserError` on every rank if the loss was not finite.
        """
        sums = result.share(torch.stack([self._sum, torch.full_like(self._sum, self._count)]), self.world_size)
        loss = float(sums[0] / sums[1])  # the host waits for the device here
        wait_for(self.device)
        seconds = time.perf_counter() - self._begin
        if not np.isfinite(loss):
            on = checkpoint.way_on(self.output_dir)
            ranks.agree(
                UserError(f"the loss is not finite by update {run.done}; lower --blr, or give --clip_grad 1{on}")
            )
        record = {
            "loss": loss,
            "lr": schedule.lr_at(run.recipe, run.done - 1),
            "seconds": seconds,
            "images_per_second": self._samples * self.world_size / seconds,
            **tested,
        }
        run.best = max(run.best, tested.get("accuracy", 0.0))
        self._tell(run.done, run.done / run.recipe.steps_per_epoch, record)
        self._restart()

    def _restart(self) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._count = self._samples = 0
        self._begin = time.perf_counter()

    def _tell(self, step: int, epoch: float, record: dict[str, float]) -> None:
        self.write(step, epoch, record, {f"finetune/{name}": value for name, value in record.items()})
        shown = {"loss": f"{record['loss']:.3f}", "img_s": f"{record['images_per_second']:.0f}"}
        if "accuracy" in record:
            shown["accuracy"] = f"{record['accuracy']:.2f}"
            if self.rank == 0:
                self.say(f"epoch {epoch:g}: top-1 {record['accuracy']:.2f} %, loss {record['loss']:.3f}")
        self.progress.set_postfix(shown)
