"""Choosing which patches a classifier sees, by a pretrained model's difficulty (TPAMI, pilot experiment, Tab. IX)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasthpm.data.statistics import PixelStatistics
from fasthpm.errors import UserError
from fasthpm.probes.answers import AUTO, load_asked

POLICIES = ("random", "easiest", "hardest")


def select_tokens(
    difficulty: Tensor, keep: int | float, *, policy: str = "hardest", generator: torch.Generator | None = None
) -> Tensor:
    """Which patches to keep: int64 [B, K], ascending in every row.

    - `difficulty`: [B, L], as `predict_loss` gives it; ranked in float32, the first of equals wins
    - `keep`: K, or as a float the share of L, rounded down, at least 1
    - `policy`: "hardest", "easiest" or "random" (by `generator`, else torch's own)

    **Raises:** `UserError` for a policy that is none of these and for a K outside 1 .. L.
    """
    patches = difficulty.shape[1]
    count = max(int(keep * patches), 1) if isinstance(keep, float) else keep
    if policy not in POLICIES:
        raise UserError(f"token policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if not 1 <= count <= patches or (isinstance(keep, float) and not 0 < keep <= 1):
        raise UserError(f"keep is {keep}, expected a share in (0, 1] or 1 to {patches} patches")
    values = difficulty.float()
    if policy == "random":
        values = torch.rand(difficulty.shape, generator=generator, device=difficulty.device)
    chosen = values.argsort(dim=1, descending=policy != "easiest", stable=True)[:, :count]
    return chosen.sort(dim=1).values


class KeptTokens(nn.Module):
    """Takes the place of `patch_drop` in timm's ViT: after the positions, only the patches `ids` [B, K] go on."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, 1 + L, D] -> [B, 1 + K, D], the cls token first; everything where no ids are set."""
        if self.ids is None:
            return tokens
        index = self.ids[:, :, None].expand(-1, -1, tokens.shape[2])
        return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, index)], dim=1)


class TokenChooser:
    """Sets which patches a ViT sees, image by image.

    - `run`: pretrained, whose difficulty decides, asked as `difficulty` says (`answers.load_asked`); not needed for
      "random"
    - `pixels`: by which the images of `choose` are normalised; None = as that run's are

    **Raises:** `UserError` for a run that can't say what is hard, or with another patch grid or channels than `vit`.
    """

    def __init__(
        self,
        vit: Any,
        policy: str,
        keep: float,
        run: Path | None,
        device: torch.device,
        difficulty: str = AUTO,
        pixels: PixelStatistics | None = None,
    ) -> None:
        self.policy, self.keep, self.kept, self.pixels = policy, keep, KeptTokens(), pixels
        self.num_patches = vit.patch_embed.num_patches
        self.model = self._load(run, vit, difficulty).to(device).eval().requires_grad_(False) if run else None
        vit.patch_drop = self.kept

    def _load(self, run: Path, vit: Any, difficulty: str) -> Any:
        model, _, answers = load_asked(run, difficulty)
        if answers.problem:
            raise UserError(f"difficulty_run {run} {answers.problem}")
        ours = (model.img_size, model.patch_size, model.in_chans)
        embed = vit.patch_embed
        theirs = (tuple(embed.img_size), embed.patch_size[0], embed.proj.in_channels)
        if ours != theirs:
            raise UserError(
                f"difficulty_run {run} is of images {ours[0]}, patch {ours[1]}, {ours[2]} channels; the classifier has "
                f"{theirs[0]}, {theirs[1]}, {theirs[2]}: give a run of the same"
            )
        return model

    @torch.no_grad()
    def choose(self, images: Tensor) -> None:
        """Decide for normalised images [B, C, H, W]; the next forward of the ViT sees these patches only."""
        if self.model is None:
            difficulty = images.new_zeros(len(images), self.num_patches)
        else:
            images = self._as_the_run_sees_them(images)
            with torch.autocast(images.device.type, enabled=False):  # difficulties are ranked in float32
                difficulty = self.model.predict_loss(images.to(next(self.model.parameters()).dtype))
        self.kept.ids = select_tokens(difficulty, self.keep, policy=self.policy)

    def _as_the_run_sees_them(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] normalised anew, if the run was trained with another mean and std."""
        ours, theirs = self.pixels, self.model.pixels if self.model else None
        if ours is None or theirs in (None, ours):
            return images
        (mean, std), (own_mean, own_std) = (
            (images.new_tensor(values)[:, None, None] for values in (known.mean, known.std)) for known in (ours, theirs)
        )
        return (images * std + mean - own_mean) / own_std
