"""Memory traffic of a step beside its matrix products, by formula: what norms, residuals, GELU and softmax of blocks
read and write in fused kernels and 16 bits. A model, to compare methods by: caches may hold some of it, and a batch's
share of weights, optimizer and EMA is not in it.
"""

from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe
from fasthpm.speed.cost import Price, step_cost

TRAFFIC = 38.0  # bytes per token, channel, block and pass


def encoder_bytes(model: HPMViT, patches: int, mask_tokens: int = 0, outputs: int = 0) -> float:
    """Forward of the encoder's blocks; `outputs` saves nothing worth counting."""
    tokens = patches + mask_tokens + model.num_prefix_tokens
    return TRAFFIC * len(model.blocks) * tokens * model.embed_dim


def decoder_bytes(model: HPMViT, depth: int, dim: int, seen: int, masked: int, outputs: int) -> float:
    """Forward of a decoder's blocks: of mask tokens alone where they attend to the visible ones, which stay."""
    return TRAFFIC * depth * dim * (outputs if model.decoder_attention == "cross" else seen + masked)


BYTES = Price(encoder_bytes, decoder_bytes, lambda tokens, inputs, outputs: 0.0)


def step_bytes(model: HPMViT, recipe: Recipe) -> dict[str, float]:
    """Bytes per sample of one step: {"teacher", "student" (three passes), "total"}."""
    return step_cost(model, recipe, BYTES)
