"""The forms in which weights leave: for each library, how they are written and what it computes from what was written.

Only names, arguments and layouts live here; `fasthpm.exchange.exporting` compares outputs and decides.
"""

from fasthpm.exchange.forms.base import (
    FORMS,
    TOLERANCE,
    Form,
    attention_heads,
    blank_target,
    block_outputs,
    encoder_of,
    library,
    metadata_of,
    mlp_width,
    register,
    timm_arguments,
)
from fasthpm.exchange.forms.huggingface import (
    HuggingFaceBEiT,
    HuggingFaceBEiTMIM,
    HuggingFaceMAE,
    HuggingFaceVideoMAE,
    HuggingFaceViT,
    levels,
)
from fasthpm.exchange.forms.onnx_graph import Onnx
from fasthpm.exchange.forms.openmmlab import MMSegmentation
from fasthpm.exchange.forms.ours import Plain
from fasthpm.exchange.forms.pytorch import MAECheckpoint, Timm, TimmSAM, Torchvision

__all__ = [
    "FORMS",
    "TOLERANCE",
    "Form",
    "HuggingFaceBEiT",
    "HuggingFaceBEiTMIM",
    "HuggingFaceMAE",
    "HuggingFaceViT",
    "HuggingFaceVideoMAE",
    "MAECheckpoint",
    "MMSegmentation",
    "Onnx",
    "Plain",
    "Timm",
    "TimmSAM",
    "Torchvision",
    "attention_heads",
    "blank_target",
    "block_outputs",
    "encoder_of",
    "levels",
    "library",
    "metadata_of",
    "mlp_width",
    "register",
    "timm_arguments",
]

for _form in (
    Timm(),
    Torchvision(),
    HuggingFaceViT(),
    HuggingFaceMAE(),
    HuggingFaceVideoMAE(),
    MAECheckpoint(),
    TimmSAM(),
    HuggingFaceBEiT(),
    HuggingFaceBEiTMIM(),
    MMSegmentation(),
    Onnx(),
    Plain(),
):
    register(_form)
