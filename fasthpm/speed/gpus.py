"""GPUs that a run may be planned for: what their makers publish, and how much of it a step reaches."""

from dataclasses import dataclass

# Shares of the published figures: large bf16 products reach 0.8 of them on a Hopper, those of a step 0.8 of that;
# memory 0.9, kernels 0.85 of that. No kernel is shorter than LAUNCH.
REACHED_FLOPS, REACHED_BANDWIDTH = 0.64, 0.76
LAUNCH = 2.5e-6  # seconds
GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """A GPU, by its data sheet."""

    name: str
    memory: float  # bytes that its tools report
    bandwidth: float  # bytes per second
    bf16: float  # FLOP per second of dense products in bfloat16 with float32 sums
    link: float  # bytes per second and direction to the others of its machine

    def seconds(self, flop: float, moved: float) -> float:
        """How long a kernel takes: the longer of its products and its memory traffic."""
        return max(flop / (self.bf16 * REACHED_FLOPS), moved / (self.bandwidth * REACHED_BANDWIDTH), LAUNCH)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", 80 * GIB, 2.04e12, 312e12, 300e9),
        GPU("a100-40gb", 40 * GIB, 1.56e12, 312e12, 300e9),
        GPU("h100", 80 * GIB, 3.35e12, 989e12, 450e9),
        GPU("h200", 141e9, 4.8e12, 989e12, 450e9),
        GPU("b200", 180e9, 7.7e12, 2250e12, 900e9),
        GPU("l40s", 45 * GIB, 0.864e12, 362e12, 32e9),
        GPU("a6000", 48 * GIB, 0.768e12, 155e12, 32e9),
        GPU("rtx3090", 24 * GIB, 0.936e12, 71e12, 16e9),
        GPU("rtx4090", 24 * GIB, 1.008e12, 165e12, 32e9),
        GPU("rtx5090", 32 * GIB, 1.792e12, 210e12, 64e9),
    )
}
