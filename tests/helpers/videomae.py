"""VideoMAE's names of our weights."""

from torch import Tensor

from fasthpm.model import HPMViT


def their_name(name: str) -> str:
    """VideoMAE's name of one of our tensors."""
    decoder = {
        "decoder_embed.": "encoder_to_decoder.",
        "decoder_blocks.": "decoder.blocks.",
        "decoder_norm.": "decoder.norm.",
        "decoder_pred.": "decoder.head.",
        "mask_token": "mask_token",
    }
    ours = next((key for key in decoder if name.startswith(key)), "")
    return decoder[ours] + name.removeprefix(ours) if ours else f"encoder.{name}"


def their_names(model: HPMViT) -> dict[str, Tensor]:
    """A state dict as VideoMAE's trainer writes it: no positions, no biases of keys."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("pos_embed") or "losspred" in name:
            continue
        theirs = their_name(name)
        if name.endswith("attn.qkv.bias"):
            query, _, values = value.chunk(3)
            state[theirs.replace("qkv.bias", "q_bias")], state[theirs.replace("qkv.bias", "v_bias")] = query, values
        else:
            state[theirs] = value
    return state
