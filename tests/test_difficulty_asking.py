"""Asking a model in another way than the one it was trained with, or being refused."""

from typing import Any

import pytest
import torch

from fasthpm.difficulty import DIFFICULTIES, HEAD, ask_by, averaged, fixed_noise, refusal
from fasthpm.errors import UserError
from fasthpm.layers import DifficultyHead
from fasthpm.model import HPMViT
from fasthpm.objectives import FEATURES

SMALL: dict[str, Any] = {
    "img_size": 12,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


@pytest.mark.parametrize(
    ("changes", "able"),
    [
        ({}, {"paper", "masked_query", "measured"}),
        ({"difficulty": "in_place"}, {"paper", "masked_query", "measured", "in_place"}),
        ({"predict_loss": "none"}, {"measured"}),
        ({"predict_loss": "none", "objective": FEATURES.as_wide_as(5)}, set()),
        ({"objective": FEATURES.as_wide_as(5)}, {"paper", "masked_query"}),
        ({"encoder_mask_tokens": True}, {"paper", "measured"}),
    ],
)
def test_a_model_answers_in_every_way_that_it_can(changes: dict[str, Any], able: set[str]) -> None:
    model = HPMViT(**SMALL | changes).eval()
    images = torch.randn(2, 1, 12, 12)
    answers = {}
    for name in DIFFICULTIES:
        before = model.difficulty
        if name not in able:
            with pytest.raises(UserError, match=f"^difficulty {name} (needs|asks|measures) .*; expected ") as caught:
                ask_by(model, name)
            assert "\n" not in str(caught.value)
            assert model.difficulty == before
            continue
        ask_by(model, name)
        assert model.difficulty == name
        with torch.no_grad():
            answers[name] = model.predict_loss(images)
    assert {name for name in DIFFICULTIES if not refusal(model, name)} == able
    assert all(answer.shape == (2, 9) and answer.isfinite().all() for answer in answers.values())
    assert len({tuple(answer.flatten().tolist()) for answer in answers.values()}) == len(able)


def test_cross_decoders_know_one_question() -> None:
    model = HPMViT(**SMALL, decoder_attention="cross")
    ask_by(model, "measured")
    ask_by(model, "paper")
    assert model.difficulty == "masked_query"


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(UserError, match=r"difficulty is 'mesured', expected one of paper.*did you mean 'measured'"):
        ask_by(HPMViT(**SMALL), "mesured")


def test_a_head_of_another_model_answers_once_it_is_there() -> None:
    model = HPMViT(**SMALL).eval()
    setattr(model, HEAD, DifficultyHead(16).eval())
    ask_by(model, "in_place")
    images = torch.randn(2, 1, 12, 12)
    torch.testing.assert_close(model.predict_loss(images), model.difficulty_head(model.encode(images)[:, 1:]))


@torch.no_grad()
def test_looks_are_averaged() -> None:
    """Each set of looks another one, the first that of `predict_loss`; a way that does not look is asked once."""
    model, images = HPMViT(**SMALL).eval(), torch.randn(2, 1, 12, 12)
    ask_by(model, "measured")
    patches = model.patchify(images)
    single = [model.predict_loss(patches, noise=fixed_noise(patches, number)) for number in range(3)]
    assert torch.equal(single[0], model.predict_loss(images))
    assert not torch.equal(single[0], single[1])
    torch.testing.assert_close(averaged(model, images, 3), (single[0] + single[1] + single[2]) / 3)
    ask_by(model, "paper")
    assert torch.equal(averaged(model, images, 3), model.predict_loss(images))
