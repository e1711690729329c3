"""The encoder as an ONNX graph, for the programs that serve models."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthpm.checkpoint.foreign import ENCODER_PREFIXES
from fasthpm.exchange.forms.base import Form, library, quoted, unmet
from fasthpm.layers import PINNED, run_blocks
from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe

OPSET = 18  # of the operators: onnxruntime from 1.14 on
LARGEST = 2**31 - 2**24  # bytes of weights; a file of protobuf ends at 2 GiB
IMAGES = 2  # that it is traced with
SINGLE_PRECISION = 8.0  # how many times our own error in float32 the graph's may be
EPSILON = torch.finfo(torch.float32).eps


class Onnx(Form):
    """One ONNX file of the encoder in float32, opset 18, for any number of images of the run's size.

    Input "images" [B, C, H, W], clips [B, C, T, H, W], normalised; output "tokens" [B, 1 + L, D], cls first (a video
    model has none), after the final norm. The metadata properties hold what the other files' metadata does. It is
    written by torch's exporter (onnx, onnxscript) and compared in onnxruntime, with another number of images than it
    was written with.

    A graph computes in float32, our outputs are in float64: the graph may err 8 times as much as our own encoder does
    in float32 (which is about 1e-6 of the largest output, 1e-5 for weights far from trained ones).
    """

    name = "onnx"
    library, summary = "onnxruntime", "encoder as an ONNX graph, float32, any number of images"
    default = "encoder.onnx"
    takes = ("image", "video")

    def refusal(self, model: HPMViT) -> str:
        state = model.state_dict().items()
        size = sum(4 * value.numel() for key, value in state if key.startswith(ENCODER_PREFIXES))
        return unmet({f"weights below 2 GiB, this encoder's are {size / 2**30:.2f} GiB": size <= LARGEST})

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        for package in ("onnx", "onnxscript"):
            library(package, package)
        shape = (model.in_chans, *((model.num_frames,) if model.video else ()), *model.img_size)
        program = exported(Graph(copy.deepcopy(model).float()).eval(), torch.zeros(IMAGES, *shape))
        program.model.metadata_props.update(metadata)
        program.save(path, external_data=False)

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        runtime = library("onnxruntime", "onnxruntime")
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        many = torch.cat([images, images[:1]]).float().numpy()
        return torch.from_numpy(session.run(["tokens"], {"images": many})[0])[: len(images)].double()

    def allowed(self, model: HPMViT, images: Tensor, mask: Tensor) -> float:
        ours, single = model.encode(images), copy.deepcopy(model).float().encode(images.float())
        return SINGLE_PRECISION * max(float((single - ours).abs().max() / ours.abs().max()), EPSILON)

    def usage(self, path: Path) -> str:
        loaded = f"import onnxruntime; model = onnxruntime.InferenceSession({quoted(path)})"
        return f'{loaded}  # model.run(["tokens"], {{"images": float32 images}})[0]'


class Graph(nn.Module):
    """`HPMViT.encode` without a mask, in operators that a graph has for any number of images: a convolution cuts out
    the patches, in the order in which `patchify` does.
    """

    def __init__(self, model: HPMViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, (T,) H, W] -> [B, 1 + L, D]; of a video model [B, L, D]."""
        model, projection = self.model, self.model.patch_embed.proj
        convolution = F.conv3d if model.video else F.conv2d
        side = projection.weight.shape[2:]
        patches = convolution(images, projection.weight, projection.bias, stride=side).flatten(2).transpose(1, 2)
        prefix = model.num_prefix_tokens
        tokens = patches + model.pos_embed[:, prefix:]
        if prefix:
            cls = (model.cls_token + model.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([cls, tokens], dim=1)
        return model.norm(run_blocks(model.blocks, tokens))


@torch.no_grad()
def exported(graph: Graph, images: Tensor) -> Any:
    """torch's `ONNXProgram` of a graph, for any number of images."""
    pinned = dict(PINNED)
    PINNED.clear()  # kernels are looked up by sizes, which would fix the number of images
    try:
        return torch.onnx.export(
            graph,
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["tokens"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    finally:
        PINNED.update(pinned)
