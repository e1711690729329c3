"""Find a codebook of patches in one's own images: `python -m data_prep.codebook X.beton codebook.safetensors`.

k-means over patches of training crops, each without its own mean and contrast. Then pretraining predicts which of the K
patches is masked: `fasthpm pretrain --recipe beit_… --target_weights kmeans:codebook.safetensors --target_dim K`.
The same data, flags and seed give the same codebook. It is written when it is whole.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.sets import progress_bar
from fasthpm.cli import Parser, run_command
from fasthpm.data import build_loader, read_info
from fasthpm.data.sources import is_video_set
from fasthpm.errors import UserError
from fasthpm.files import check_place, replacing, writing
from fasthpm.rules import patches_fill_image, sides_of
from fasthpm.tokenizers import Codebook, nearest, save_codebook

BATCH = 64  # images that are read at a time
MINIBATCH = 8192  # patches from which the codes move at a time
SEEDING = 16384  # patches among which codes begin
OF_AN_IMAGE = 16  # patches that are taken of an image, at most


class Found(NamedTuple):
    """What k-means came to."""

    codes: Tensor  # float32 [K, P*P*C]
    distance: float  # mean squared distance of a patch's values to its code's
    perplexity: float  # exp of the entropy of the tokens: so many of them would be used alike


def take_patches(arguments: argparse.Namespace) -> tuple[Tensor, Codebook]:
    """Normalised patches of random training crops, float32 [N, P*P*C], and a codebook without codes, which knows how
    they were normalised. **Raises:** `UserError` for data that has no such patches, or too few."""
    size, side = sides_of(arguments.input_size), arguments.patch_size
    patches_fill_image(arguments.input_size, size, side)
    if is_video_set(Path(arguments.data)):
        raise UserError(f"{arguments.data} is a set of videos, and codebooks are of images; give a set of images")
    generator, info = torch.Generator().manual_seed(arguments.seed), read_info(arguments.data, arguments.channels)
    loader = build_loader(
        arguments.data,
        batch_size=min(BATCH, info.num_samples),
        image_size=size,
        channels=arguments.channels,
        seed=arguments.seed,
        crop_min=arguments.crop_min,
        num_workers=arguments.num_workers,
    )
    empty = Codebook(torch.zeros(0, side * side * arguments.channels), side, info.mean, info.std)
    each = min(OF_AN_IMAGE, size[0] * size[1] // side**2)
    rows: list[Tensor] = []
    epoch, taken = 0, 0
    try:
        with progress_bar(arguments.patches, "read", "patch") as bar:
            while taken < arguments.patches:
                loader.set_epoch(epoch)
                for images in loader:
                    found = empty.normalised(empty.cut(images.images))
                    chosen = torch.rand(found.shape[:2], generator=generator).argsort(dim=1)[:, :each]
                    rows.append(found.gather(1, chosen[:, :, None].expand(-1, -1, found.shape[2])).flatten(0, 1))
                    bar.update(min(len(rows[-1]), arguments.patches - taken))
                    taken += len(rows[-1])
                    if taken >= arguments.patches:
                        break
                epoch += 1
    finally:
        loader.close()
    return torch.cat(rows)[: arguments.patches], empty


def cluster(rows: Tensor, size: int, passes: int, seed: int) -> Found:
    """Mini-batch k-means: every code moves to the mean of the patches that were nearest to it, later ones by less.

    A code that was nearest to none in a pass begins anew at a patch far from its code.

    - `rows`: float32 [N, D]; `size`: K
    """
    generator = torch.Generator().manual_seed(seed)
    codes = seeded(rows[torch.randperm(len(rows), generator=generator)[: max(size, SEEDING)]], size, generator)
    steps = passes * math.ceil(len(rows) / MINIBATCH)
    with progress_bar(steps, "cluster", "step") as bar:
        for _ in range(passes):
            counts = torch.zeros(size)
            for part in torch.randperm(len(rows), generator=generator).split(MINIBATCH):
                _move(codes, counts, rows[part])
                bar.update()
            _revive(codes, counts, rows[part])
    ids = nearest(rows, codes)
    shares = torch.bincount(ids, minlength=size) / len(rows)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    return Found(codes, float((rows - codes[ids]).square().mean()), float(entropy.exp()))


def seeded(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """k-means++: each code begins at a row that is drawn by its squared distance from the codes before it."""
    picked = [0]
    away = (rows - rows[0]).square().sum(dim=1)
    squares = rows.square().sum(dim=1)
    with progress_bar(size, "seed", "code") as bar:
        while len(picked) < size:
            total = away.double().cumsum(0)
            draw = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
            picked.append(min(int(torch.searchsorted(total, draw)), len(rows) - 1))
            code = rows[picked[-1]]
            away = torch.minimum(away, squares - 2 * (rows @ code) + code.square().sum()).clamp_min_(0)
            bar.update()
    return rows[picked].clone()


def _move(codes: Tensor, counts: Tensor, rows: Tensor) -> None:
    """Move the codes towards the rows nearest to them; `counts`: rows of this pass that each has had."""
    ids = nearest(rows, codes)
    had = torch.bincount(ids, minlength=len(codes)).float()
    sums = torch.zeros_like(codes).index_add_(0, ids, rows)
    counts += had
    codes += (sums - had[:, None] * codes) / counts.clamp_min(1)[:, None]


def _revive(codes: Tensor, counts: Tensor, rows: Tensor) -> None:
    """Put codes without rows at the rows farthest from theirs."""
    dead = (counts == 0).nonzero()[:, 0]
    far = (rows - codes[nearest(rows, codes)]).square().sum(dim=1).argsort(descending=True)[: len(dead)]
    codes[dead[: len(far)]] = rows[far]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. **Raises:** `UserError` for values out of range."""
    parser = Parser(prog="data_prep.codebook", description=__doc__)
    parser.add_argument("data", help="a prepared set (.beton), or a folder of images")
    parser.add_argument("out", type=Path, help="the codebook, a .safetensors file")
    parser.add_argument("--size", type=int, default=8192, help="codes K (default: 8192)")
    parser.add_argument("--patch_size", type=int, default=16, help="side of a patch, as in pretraining (default: 16)")
    parser.add_argument("--input_size", default="224", help="side of the training crop, or HEIGHTxWIDTH (default: 224)")
    parser.add_argument("--channels", type=int, default=3, help="channels of the recipe's images (default: 3)")
    parser.add_argument("--crop_min", type=float, default=0.2, help="smallest share of an image that a crop covers")
    parser.add_argument("--patches", type=int, default=0, help="patches to learn from (default: 0 = 40 per code)")
    parser.add_argument("--passes", type=int, default=10, help="times that all of them are seen (default: 10)")
    parser.add_argument(
        "--num_workers", type=int, default=0, help="decoding threads (default: 0 = the machine's cores)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    for name, least in (("size", 2), ("patch_size", 1), ("channels", 1), ("passes", 1), ("patches", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"{name} is {getattr(arguments, name)}, expected {least} or more")
    arguments.patches = arguments.patches or max(40 * arguments.size, 10_000)
    if arguments.patches < arguments.size:
        raise UserError(f"patches {arguments.patches} are fewer than the {arguments.size} codes; use more --patches")
    if arguments.out.suffix != ".safetensors":
        raise UserError(f"{arguments.out} is no .safetensors file; give a name that ends so")
    check_place(arguments.out, "the codebook")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m data_prep.codebook`."""
    arguments = parse_arguments(argv)
    rows, empty = take_patches(arguments)
    found = cluster(rows, arguments.size, arguments.passes, arguments.seed)
    book = Codebook(found.codes, empty.patch_size, empty.mean, empty.std)
    notes = {"tokens": arguments.size, "channels": arguments.channels, "data": str(arguments.data)}
    notes |= {"patches": len(rows), "seed": arguments.seed, "perplexity": found.perplexity}
    with writing(arguments.out, "make room, or choose another name"):
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(arguments.out) as aside:
            save_codebook(book, aside, notes)
    print(
        f"{arguments.out}: {arguments.size} codes of {len(rows)} patches, "
        f"mean square distance {found.distance:.3f}, used as {found.perplexity:.0f} would be that are used alike\n"
        f"next: fasthpm pretrain … --target tokens --target_weights kmeans:{arguments.out} --target_dim "
        f"{arguments.size}"
    )


if __name__ == "__main__":
    run_command(main)
