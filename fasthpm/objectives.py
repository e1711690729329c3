"""What the masked patches of a run are compared with, and how: pixels, features, tokens or distributions.

An objective is one record: what a target is per patch, how wide the prediction, and what the loss of a patch is.
Whatever reads losses per patch (the loss predictor, its ranking, masks, maps, panels) does not ask which it is.

Letters: B batch, L patches, M masked patches, K classes, D' features.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fasthpm import loss as losses

PatchLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """What a model predicts of every patch, and by which loss. A model has one with its own `width`: see `as_wide_as`.

    - `target`: what a target is, for messages
    - `loss`: (prediction [B, M, width], targets of the masked patches) -> float32 [B, M]; None = of pixels, which the
      model makes its targets of by itself
    - `ids`: a target is one class id per patch, int64 [B, L]; else a row of `width` numbers, [B, L, width]
    - `width`: numbers that are predicted per patch; 0 = as many as a patch has pixels
    """

    name: str
    target: str
    loss: PatchLoss | None = None
    ids: bool = False
    width: int = 0

    def as_wide_as(self, width: int, loss: PatchLoss | None = None) -> "Objective":
        """The same of `width` features or classes, with another `loss` if one is given."""
        return Objective(self.name, self.target, loss or self.loss, self.ids, width)

    def check(self, target: Tensor | None) -> None:
        """**Raises:** `ValueError` for targets [B, L] or [B, L, width] that are not this objective's."""
        if self.ids:
            if target is None or target.dim() != 2 or target.is_floating_point():
                found = "none" if target is None else f"{target.dtype} {tuple(target.shape)}"
                raise ValueError(f"the targets are {found}, the model predicts {self.width} tokens: ids, int64 [B, L]")
            return
        given = 0 if target is None else target.shape[-1]
        if given != self.width:
            raise ValueError(f"the target has {given} {self.target} per patch, the model predicts {self.width}")


PIXELS = Objective("pixels", "features")
FEATURES = Objective("features", "features", losses.feature_loss)
TOKENS = Objective("tokens", "ids", losses.token_loss, ids=True)
DISTRIBUTIONS = Objective("distributions", "probabilities", losses.distribution_loss)
OBJECTIVES = {one.name: one for one in (PIXELS, FEATURES, TOKENS, DISTRIBUTIONS)}
