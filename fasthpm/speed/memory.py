"""What a GPU's memory holds beside activations: weights, gradients, optimizer, teacher, by ZeRO stage."""

CONTEXT = 1.5 * 2**30  # bytes: the driver's context, cuBLAS, NCCL
MASTER = 3 * 4  # bytes per parameter in the optimizer: float32 weight and AdamW's two moments


def state_bytes(
    parameters: int, teacher: int, *, stage: int, world_size: int, bf16: bool = True, ema: bool = True
) -> float:
    """Bytes on one GPU that stay for the whole run.

    - `parameters`: of the student; `teacher`: of the copy that runs forward, 0 = none
    - `stage`: of ZeRO: 1 shares out the optimizer and the average, 2 gradients too, 3 weights too
    - `bf16`: the forward pass is in bfloat16, beside float32 masters; else weights are their own masters
    - `ema`: an average of the student is kept
    """
    size = 2 if bf16 else 4
    shares = {part: world_size if stage >= number else 1 for part, number in (("state", 1), ("grad", 2), ("weight", 3))}
    masters = MASTER if bf16 or stage else MASTER - 4
    kept = parameters * (masters + (4 if ema else 0)) / shares["state"]
    return parameters * size / shares["weight"] + parameters * 4 / shares["grad"] + kept + teacher * size
