"""How ZeRO lays out the masters that the teacher follows."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fasthpm.errors import UserError
from fasthpm.ranks.zero import Group, MasterLayout, Slot, _common_elements


@pytest.mark.parametrize("stage", range(4))
def test_an_unknown_deepspeed_is_one_clear_error(stage: int) -> None:
    changed = SimpleNamespace(
        basic_optimizer=torch.optim.AdamW([torch.zeros(1)]),
        optimizer=SimpleNamespace(),
        module=nn.Linear(1, 1),
        seq_data_parallel_group=None,
        zero_optimization_stage=lambda: stage,
    )
    with pytest.raises(UserError, match=r"deepspeed .* keeps its master weights differently .* constraints\.txt"):
        MasterLayout(changed)


@pytest.mark.parametrize(("rank", "known"), [(0, [1.0, 2.0]), (1, [3.0])])
def test_padding_behind_a_parameter_is_not_compared(rank: int, known: list[float]) -> None:
    """ZeRO 3 leaves it uninitialised, and it may well read as NaN."""
    stripe = torch.tensor([*known, *[float("nan")] * (2 - len(known))])
    group = Group(stripe, torch.float32, (Slot("w", torch.Size([3]), 0, 2),), shards=2, index=rank)
    weight = nn.Parameter(torch.zeros(3))
    weight.ds_tensor = stripe.clone()  # type: ignore[attr-defined]
    assert torch.equal(*_common_elements(group, group.slots[0], stripe, weight))
    weight.ds_tensor[0] += 1  # type: ignore[attr-defined]
    assert not torch.equal(*_common_elements(group, group.slots[0], stripe, weight))
