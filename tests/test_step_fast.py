"""The step in fast modes."""

import pytest
import torch

from tests.helpers import reference
from tests.helpers.fast_modes import MODES
from tests.helpers.steps import ALPHA, NoSynchronisation, batch, step_of


@pytest.mark.parametrize("mode", MODES)
def test_fast_steps_train_everything_and_never_wait(mode: str) -> None:
    step = step_of(**MODES[mode])
    images, ids = batch(side=step.recipe.image_size[0])
    with NoSynchronisation():
        step(images, ids, torch.tensor(3), ALPHA).loss.backward()
    assert not [name for name, weight in step.named_parameters() if weight.grad is None]
    agreement = float(step.map_spearman(images))
    assert (agreement < 1) is step.recipe.approximates_teacher
    assert agreement > -1


def test_kept_maps_make_the_masks_and_there_is_no_teachers_pass() -> None:
    step = step_of(teacher_maps=True)
    images, ids = batch()
    maps = torch.rand(6, 49, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("predict_loss", "encode"):
            patch.setattr(step._teacher[0], name, lambda *_: pytest.fail("the teacher ran"))
        mask = step(images, ids, torch.tensor(3), ALPHA, maps).mask
    _, hard = reference.mask_counts(49, 0.75, 0.5)
    for row, values in zip(mask, maps, strict=True):
        assert row[values.argsort(descending=True)[:hard]].all()
    first = step(images, ids, torch.tensor(3), ALPHA, None).mask  # before the first maps: random, whatever alpha is
    usual = step_of(mask_policy="random", predict_loss="relative")
    assert torch.equal(first.sum(1), usual(images, ids, torch.tensor(3), ALPHA).mask.sum(1))
    assert torch.equal(first, step(images, ids, torch.tensor(3), 0 * ALPHA, maps).mask)
    assert float(step.map_spearman(images, maps)) < 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's sync debug mode watches a GPU, and there is none")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype
@pytest.mark.parametrize("mode", MODES)
def test_no_sync_on_a_gpu(mode: str) -> None:
    device = torch.device("cuda")
    step = step_of(**MODES[mode]).to(device)
    step._teacher[0].to(device)
    images, ids = (x.to(device) for x in batch(side=step.recipe.image_size[0]))
    number, alpha = torch.tensor(3, device=device), ALPHA.to(device)
    step(images, ids, number, alpha).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(images, ids, number, alpha).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
