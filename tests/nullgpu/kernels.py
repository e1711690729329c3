"""What pairs of patches ask of the GPU, eagerly and as a graph, and the choice of attention kernels there."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tests.nullgpu import card

SIZES = ((256, 147), (32, 1411))  # images and clips


def compare(predicted: Tensor, actual: Tensor, difficulty: Tensor, masked: Tensor) -> None:
    """A step's loss and metrics of pairs, and the gradient, as `step.Step` has them."""
    from fasthpm import loss
    from fasthpm.step import HEALTH_SAMPLES

    some = slice(HEALTH_SAMPLES)
    value = loss.ranking_loss(predicted, actual)
    health = loss.health(predicted[some], actual[some], difficulty[some].gather(1, masked[some]))
    torch.cat([torch.stack([value.detach()] * 3), health])
    torch.autograd.grad(value, predicted, torch.ones_like(value))


def pairs_of(batch: int, count: int) -> tuple[dict[str, Any], list[str]]:
    """What the second call asks for, and the graphs that replaying a recorded one launches."""
    values = torch.zeros(3, batch, count, device="cuda").unbind(0)
    inputs = (values[0].requires_grad_(), *values[1:], torch.zeros(batch, count, dtype=torch.int64, device="cuda"))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        compare(*inputs)
        with card.Watch() as watch:
            compare(*inputs)
        with torch.cuda.graph(graph, stream=stream):
            compare(*inputs)
        with card.Watch() as replayed:
            graph.replay()
    kernels = sorted(name.removeprefix("T ") for name in watch.calls if name.startswith("T "))
    return watch.summary | {"kernels": kernels}, list(replayed.summary["graphs"])


def chosen(asked: str) -> tuple[dict[str, str], int]:
    """The kernels of a small recipe, and how many of the kind "efficient" a call of its first shape launches."""
    from fasthpm import layers, recipes
    from fasthpm.commands import attention
    from fasthpm.speed.attention import inputs_of

    recipe, device = dataclasses.replace(recipes.debug(), attention_backend=asked), torch.device("cuda")
    named = attention.settle(recipe, device, torch.bfloat16)
    _, inputs = inputs_of(attention.shapes_of(recipe, torch.bfloat16)[0], device)
    with card.Watch() as watch:
        layers.attend(*inputs)
    return named, sum(number for name, number in watch.calls.items() if "fmha_cutlass" in name)


def main() -> None:
    card.prepare()
    found, launched = {}, {}
    for asked in ("auto", "efficient"):
        found[asked], launched["flash" if asked == "auto" else asked] = chosen(asked)
    pairs, graphs = zip(*(pairs_of(*size) for size in SIZES), strict=True)
    card.report(found | {"launched": launched, "pairs": pairs, "graph": graphs[0]})


if __name__ == "__main__":
    main()
