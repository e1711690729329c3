"""How a teacher is asked what is hard: records, as masks are.

The papers' loss predictor is trained on mask tokens, and their teacher reads it off visible ones: a question that it
never learnt to answer. Each record here is another question, or another one who answers.

Letters: B batch, L patches, V visible and M = L - V masked ones of the student, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fasthpm.errors import UserError, nearest
from fasthpm.mask import num_masked, sample_noise, spread_units
from fasthpm.objectives import Objective

HEAD = "difficulty_head"  # the part of a model that answers `in_place`
HEAD_SHARE = 16  # where maps are kept it learns on one of so many samples of a batch
VIEW_SEED = 0x51EED  # apart from the noise of the masks
LEAST_VIEWS = 2


class Asked(Protocol):
    """What is asked: the part of `fasthpm.model.HPMViT` that is needed for it, which says what each is."""

    num_prefix_tokens: int
    grid_size: tuple[int, int]
    decoder_attention: str
    encoder_mask_tokens: bool
    predict_loss_kind: str
    objective: Objective
    difficulty: str
    mask_ratio: float
    mask_unit: int
    difficulty_head: Any

    def patchify(self, images: Tensor) -> Tensor: ...

    def predict_loss(
        self, images: Tensor, scale: int = 1, noise: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor: ...

    def decoder_tokens(self, tokens: Tensor, scale: int = 1) -> Tensor: ...

    def queries(self, batch: int, scale: int = 1) -> Tensor: ...

    def predictor_on(self, tokens: Tensor, last: int) -> Tensor: ...

    def reconstruction_losses(
        self, patches: Tensor, visible: Tensor, masked: Tensor, target: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Difficulty:
    """A way to learn how hard each patch of an image is, and all that the package must know of it.

    - `read`: (model, tokens [B, 1 + L, D] that `encode` gives of all patches, scale) -> float32 [B, L], higher is
      harder; `scale` as in `HPMViT.predict_loss`
    - `look`: instead of it, for those that encode by themselves: (model, patches [B, L, t*P*P*C], noise [B, L], target
      of all patches or None) -> float32 [B, L]
    - `predictor`: the loss predictor answers, so the model needs one
    - `head`: a small head on the teacher's features answers, which learns beside the student
    - `scales`: also answers for images made smaller (teacher_scale)
    - `mask_tokens_in_encoder`: also answers for models whose mask tokens enter the encoder (SimMIM)
    """

    name: str
    summary: str  # one line for the docs
    likely: str = ""  # which difficulty_spearman to expect: what small runs had, bench.evidence_difficulty
    read: Callable[[Asked, Tensor, int], Tensor] | None = None
    look: Callable[[Asked, Tensor, Tensor, Tensor | None], Tensor] | None = None
    predictor: bool = False
    head: bool = False
    scales: bool = False
    mask_tokens_in_encoder: bool = True


DIFFICULTIES: dict[str, Difficulty] = {}


def register(way: Difficulty) -> Difficulty:
    """Make `way` known under its name, as a --difficulty. **Raises:** `ValueError` for a record that cannot work."""
    if way.name in DIFFICULTIES:
        raise ValueError(f"there is a difficulty {way.name} already; give the new one another name")
    if (way.read is None) == (way.look is None):
        raise ValueError(f"difficulty {way.name} has both of read and look, or none; give it one of them")
    DIFFICULTIES[way.name] = way
    return way


def question_of(name: str, decoder_attention: str) -> str:
    """The question that difficulty `name` is in a model: cross decoders know masked_query and not paper."""
    return "masked_query" if (name, decoder_attention) == ("paper", "cross") else name


# ------------------------------------------------------------------------------------------------- asking a model
def refusal(model: Asked, name: str, *, targets: bool = False) -> str:
    """Why `model` cannot be asked by difficulty `name`: the rest of a sentence; an empty string if it can.

    - `targets`: whoever asks gives the targets of the images, too
    """
    way = DIFFICULTIES[name]
    if way.predictor and model.predict_loss_kind == "none":
        return "needs a loss predictor, which this model lacks"
    if way.head and not hasattr(model, HEAD):
        return "needs a difficulty head, which this model lacks"
    if model.encoder_mask_tokens and not way.mask_tokens_in_encoder:
        return "asks with mask tokens in the decoder, and those of this model enter its encoder"
    if way.look and model.objective.width and not targets:
        return f"measures losses, and those of this model are of {model.objective.name}, which nobody gives here"
    return ""


def ask_by(model: Asked, name: str) -> None:
    """Let `model.predict_loss` answer by difficulty `name` from now on, whatever it was trained with.

    **Raises:** `UserError` for an unknown name, and for one that the model cannot answer by; the model stays as it was.
    """
    if name not in DIFFICULTIES:
        raise UserError(
            f"difficulty is {name!r}, expected one of {', '.join(DIFFICULTIES)}{nearest(name, DIFFICULTIES)}"
        )
    question = question_of(name, model.decoder_attention)
    if reason := refusal(model, question):
        able = [other for other in DIFFICULTIES if not refusal(model, question_of(other, model.decoder_attention))]
        raise UserError(f"difficulty {name} {reason}; expected {' or '.join(able) or 'another model'}")
    model.difficulty = question


def averaged(model: Asked, images: Tensor, looks: int) -> Tensor:
    """`model.predict_loss(images)`, where the model looks by itself averaged over `looks` sets of looks: float32
    [B, L]."""
    if DIFFICULTIES[model.difficulty].look is None:
        return model.predict_loss(images)
    patches = model.patchify(images)
    return torch.stack([model.predict_loss(patches, noise=fixed_noise(patches, k)) for k in range(looks)]).mean(0)


# ------------------------------------------------------------------------------------------------- the ways
def _paper(model: Asked, tokens: Tensor, scale: int) -> Tensor:
    """The loss predictor on visible tokens, of each patch itself (CVPR 3.3)."""
    return model.predictor_on(model.decoder_tokens(tokens, scale), tokens.shape[1] - model.num_prefix_tokens)


def _masked_query(model: Asked, tokens: Tensor, scale: int) -> Tensor:
    """The loss predictor on a mask token at every place, as it was trained to be asked.

    In cross attention these attend to all visible tokens, and not to each other. In self-attention, which mixes all,
    as many visible tokens are beside them as the student leaves, evenly spread: L + V tokens, not 2 L.
    """
    prefix, count = model.num_prefix_tokens, tokens.shape[1] - model.num_prefix_tokens
    known = model.decoder_tokens(tokens, scale)
    if model.decoder_attention == "self":
        visible = max(1, count - num_masked(count, model.mask_ratio))
        kept = torch.arange(visible, device=known.device) * count // visible + count // visible // 2
        known = torch.cat([known[:, :prefix], known[:, prefix:][:, kept]], dim=1)
    return model.predictor_on(torch.cat([known, model.queries(len(tokens), scale)], dim=1), count)


def _in_place(model: Asked, tokens: Tensor, scale: int) -> Tensor:
    """The head on the features of each visible patch."""
    return model.difficulty_head(tokens[:, model.num_prefix_tokens :])


class View(NamedTuple):
    """A look at part of an image: patch numbers, ascending."""

    visible: Tensor  # int64 [B, V]
    asked: Tensor  # int64 [B, A], where the loss is wanted
    masked: Tensor  # int64 [B, M or A], what is masked: the asked ones, and more where the model needs them


def views(noise: Tensor, grid_size: tuple[int, int], mask_ratio: float, unit: int = 1) -> Iterator[View]:
    """Looks at an image with the student's eyes: as many visible patches as the student has (about as many of a video,
    whose masks are counted slot by slot), and every patch asked for in exactly one look, in which it is masked.

    The patches are put in a random order, and the looks are windows of it: some visible ones, then the asked ones. Two
    looks, more where the student masks less than half; they see different patches.

    - `noise`: [B, L] in [0, 1); `unit`: side of the squares in patches that are masked as a whole
    """
    count = noise.shape[1] // unit**2
    visible = count - num_masked(count, mask_ratio)
    looks = max(LEAST_VIEWS, -(-count // (count - visible)))
    order = noise[:, :count].argsort(dim=1).argsort(dim=1)
    for look in range(looks):
        first, last = look * count // looks, (look + 1) * count // looks
        place = (order - first) % count
        asked = (place >= visible) & (place < visible + last - first)
        parts = [spread_units(part, grid_size, unit) for part in (place < visible, asked, place >= visible)]
        sizes = [unit**2 * size for size in (visible, last - first, count - visible)]
        yield View(*(_numbers(part, size) for part, size in zip(parts, sizes, strict=True)))


def _numbers(chosen: Tensor, size: int) -> Tensor:
    """Where bool [B, L] is True, `size` times per row: int64 [B, size], ascending. No host synchronisation."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]


def _measured(model: Asked, patches: Tensor, noise: Tensor, target: Tensor | None) -> Tensor:
    """The loss itself: the model reconstructs every patch from a look in which it is masked.

    Mask tokens that nobody asks for are left out, except in SimMIM, where they are part of the image.
    """
    ids: list[Tensor] = []
    losses: list[Tensor] = []
    for view in views(noise, model.grid_size, model.mask_ratio, model.mask_unit):
        hidden = view.masked if model.encoder_mask_tokens else view.asked
        found = model.reconstruction_losses(patches, view.visible, hidden, target)
        if model.encoder_mask_tokens:
            whole = found.new_zeros(patches.shape[:2]).scatter(1, hidden, found)
            found = whole.gather(1, view.asked)
        ids.append(view.asked)
        losses.append(found)
    values = torch.cat(losses, dim=1)
    return torch.empty_like(values).scatter(1, torch.cat(ids, dim=1), values)


def view_noise(step: Tensor, ids: Tensor, num_patches: int, seed: int = 0) -> Tensor:
    """The noise of `views`, [B, L]: of (seed, update, sample) alone. Arguments as in `sample_noise`."""
    return sample_noise(seed ^ VIEW_SEED, step, ids, num_patches, draws=1)[0]


def fixed_noise(patches: Tensor, number: int = 0) -> Tensor:
    """The noise of `views` where nothing else is given: [B, L], the same for all images; another per `number`."""
    zero = torch.zeros((), dtype=torch.int64, device=patches.device)
    return view_noise(zero + number, zero.expand(len(patches)), patches.shape[1])


register(
    Difficulty(
        "paper",
        "the loss predictor reads every patch where it is visible (HPM)",
        likely="-0.4 to 0.5",
        read=_paper,
        predictor=True,
        scales=True,
    )
)
register(
    Difficulty(
        "masked_query",
        "the loss predictor is asked with a mask token at every place, as it was trained (ours)",
        likely="0.4 to 0.8",
        read=_masked_query,
        predictor=True,
        scales=True,
        mask_tokens_in_encoder=False,
    )
)
register(
    Difficulty(
        "in_place",
        "a small head on the teacher's features, which learns from the step's losses (ours)",
        likely="0.5 to 0.8",
        read=_in_place,
        head=True,
    )
)
register(
    Difficulty(
        "measured",
        "the teacher reconstructs every patch where it is masked, and the loss is measured (ours)",
        likely="0.7 to 0.9",
        look=_measured,
    )
)
