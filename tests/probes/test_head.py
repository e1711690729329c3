"""The linear head: learning rates, LARS and its norm, against MAE's figures."""

import dataclasses

import pytest
import torch
from torch import nn

from fasthpm import recipes, schedule
from fasthpm.probes import head
from tests.helpers.golden import SCHEDULES
from tests.helpers.reference import lars_step


@pytest.mark.parametrize("name", ["finetune_100", "linprobe_90"])
def test_learning_rates_are_maes(name: str) -> None:
    grid = SCHEDULES["lr_schedules"][name]
    steps = 1000
    plan = dataclasses.replace(
        recipes.debug(),
        epochs=grid["epochs"],
        warmup_epochs=grid["warmup_epochs"],
        lr=grid["lr"],
        min_lr=grid["min_lr"],
        steps_per_epoch=steps,
    )
    for epoch, expected, _ in grid["points"]:
        if name == "finetune_100":
            assert schedule.lr_at(plan, round(epoch * steps)) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        else:
            found = head.lr_at(epoch, grid["lr"], grid["warmup_epochs"], grid["epochs"])
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_lars_is_maes() -> None:
    """Three steps of weight and bias against the plain loop: weights scaled by norm ratios, biases not."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 4).double()
    optimizer = head.build_optimizer(layer, "mae")
    weights = [p.detach().clone() for p in layer.parameters()]
    momenta = [torch.zeros_like(p) for p in weights]
    for lr in (0.7, 0.4, 0.1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        grads = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in weights]
        for parameter, grad in zip(layer.parameters(), grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        weights, momenta = lars_step(weights, grads, momenta, lr)
    for parameter, expected in zip(layer.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)


def test_feature_norm_is_batch_norm() -> None:
    ours, theirs = head.FeatureNorm(5), nn.BatchNorm1d(5, eps=1e-6, affine=False)
    for seed in range(3):
        rows = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 2
        torch.testing.assert_close(ours(rows), theirs(rows))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(rows), theirs(rows))
    torch.testing.assert_close(ours.mean, theirs.running_mean)
