"""What one update of a recipe may ask of a GPU, under zero1_bf16 and with the recipe's own batch on one GPU.

Counted on the null GPU (tests/nullgpu): launches and the peak of torch's allocator do not depend on values. What
lowers them lowers the budget, too; what raises them needs a reason.
"""

from typing import NamedTuple


class Budget(NamedTuple):
    """`launches`: at most so many kernels per update; `gib`: the peak of the memory, within 1 %."""

    launches: int
    gib: float


BUDGETS = {
    "hpm_vit_base_in1k_200e": Budget(1400, 19.42),
    "mae_vit_base_in1k_200e": Budget(870, 12.22),
    "hpm_vit_base_in1k_200e_fast": Budget(1050, 11.24),
    "hpm_video_vit_base_ssv2_800e": Budget(1080, 9.10),
}
