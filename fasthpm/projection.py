"""The head that projects tokens onto prototypes (iBOT, DINO), its centres, and the distributions that come of it.

The last layer is linear without a bias. So the mean of a teacher's logits, by which they are centred, is the last layer
of the mean of what enters it: the 8,192 logits of a patch are made for masked patches alone, and never for all.

Letters: D width, K prototypes, N tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fasthpm.loss import full_precision

BOTTLENECK = 256
STUDENT_TEMPERATURE = 0.1


class ProjectionHead(nn.Module):
    """D -> K: three linear layers with GELU between, L2 norm, and a last layer of prototypes of length 1 (DINO's).

    Shared by the cls token and the patches. Parameters have the names of iBOT's.

    - `hidden`: width of the first two layers
    - `free_norm`: each prototype has a length that is learnt, and begins at 1 (`weight_g`)
    """

    def __init__(self, dim: int, prototypes: int, hidden: int, free_norm: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, BOTTLENECK)
        )
        self.last_layer = LastLayer(BOTTLENECK, prototypes, free_norm)

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """What enters the last layer, of length 1: [..., D] -> [..., 256]."""
        return F.normalize(self.mlp(tokens), dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., D] -> logits [..., K]."""
        return self.last_layer(self.bottleneck(tokens))


class LastLayer(nn.Module):
    """A linear layer without bias whose rows have length 1, or a length that is learnt."""

    def __init__(self, dim: int, prototypes: int, free_norm: bool) -> None:
        super().__init__()
        bound = dim**-0.5
        self.weight_v = nn.Parameter(torch.empty(prototypes, dim).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1)) if free_norm else None

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., dim] -> [..., K], in the precision of `tokens`."""
        rows = F.normalize(full_precision(self.weight_v), dim=-1)
        rows = rows if self.weight_g is None else rows * full_precision(self.weight_g)
        return F.linear(tokens, rows.to(tokens.dtype))


class Centres:
    """What a teacher's logits are centred by: a moving average over *updates* of their mean, of cls and of patches.

    The means of an update's micro-steps are added up on the device, and `update` takes in those of all ranks once: the
    centre is the same however an update is cut. No module: DeepSpeed would round it to bfloat16.

    - `values`: float32 [2, K], of cls and of patches; zeros at first
    """

    def __init__(self, prototypes: int, momentum: float) -> None:
        self.momentum = momentum
        self.values = torch.zeros(2, prototypes)
        self._sums = torch.zeros(2, prototypes)  # of means, one per micro-step
        self._count = torch.zeros(1)

    def move(self, device: torch.device) -> None:
        """Keep them on `device`, where they stay in place: a recorded step reads and adds there."""
        if self.values.device != device:
            self.values, self._sums = self.values.to(device), self._sums.to(device)
            self._count = self._count.to(device)

    @torch.no_grad()
    def add(self, means: Tensor) -> None:
        """Take in a micro-step's mean logits, [2, K]."""
        self._sums.add_(means)
        self._count.add_(1)

    @torch.no_grad()
    def update(self) -> None:
        """The update is over: move the centres by the mean of all its micro-steps on all ranks. Collective."""
        together = torch.cat([self._sums.flatten(), self._count])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(together)
        mean = (together[:-1] / together[-1]).view_as(self.values)
        self.values.lerp_(mean, 1 - self.momentum)
        self.forget()

    def forget(self) -> None:
        """Drop what was added since the last update."""
        self._sums.zero_()
        self._count.zero_()


def mean_logits(head: ProjectionHead, entering: Tensor) -> Tensor:
    """Mean logits of cls and of patches, float32 [2, K], without the logits themselves.

    - `entering`: `bottleneck` of all tokens, [B, 1 + L, 256]
    """
    entering = full_precision(entering)
    return head.last_layer(torch.stack([entering[:, 0].mean(0), entering[:, 1:].mean((0, 1))]))


def teacher_logits(head: ProjectionHead, entering: Tensor) -> Tensor:
    """Logits [..., K] in float32, of what enters the last layer: they are divided by small temperatures."""
    return head.last_layer(full_precision(entering))


def sharpened(logits: Tensor, centre: Tensor, temperature: Tensor | float) -> Tensor:
    """A teacher's distribution: softmax((logits - centre) / temperature), float32 [..., K]."""
    return ((full_precision(logits) - centre) / temperature).softmax(dim=-1)


def patch_distributions(teacher: Any, patches: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """A teacher's distributions of all patches, float32 [B, L, K].

    - `teacher`: an `HPMViT` with this head; `patches`: as in its `encode_in_place`; `centre`: of patches, [K]
    """
    head = teacher.decoder_pred
    entering = head.bottleneck(teacher.encode_in_place(patches)[:, 1:])
    return sharpened(teacher_logits(head, entering), centre, temperature)


def cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """-sum p log softmax(logits / 0.1) of a student's logits: float32 [...] from two [..., K].

    With probabilities that sum to 1 it is logsumexp minus a product, which needs no log-probabilities in memory.
    """
    scaled = full_precision(logits) / STUDENT_TEMPERATURE
    return scaled.logsumexp(dim=-1) - (probabilities.detach() * scaled).sum(dim=-1)


def entropy(probabilities: Tensor) -> Tensor:
    """In nats: [...] from [..., K]."""
    return torch.special.entr(probabilities).sum(dim=-1)
