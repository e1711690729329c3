"""The baseline of `bench.beit` computes what our model computes."""

from argparse import Namespace

import torch

from bench import beit
from fasthpm.mask import split_ids
from fasthpm.patches import model_of

ARGUMENTS = Namespace(size="nano", batch_size=2, tokens=7)


@torch.no_grad()
def test_the_eager_beit_is_ours() -> None:
    recipe = beit.recipe_of("beit", ARGUMENTS, "zero0_fp32")
    model = model_of(recipe)
    theirs = beit.EagerBEiT(model, 7)
    state = model.state_dict()
    names = {"decoder_pred.": "head.", "patch_embed.proj.": "patch_embed.", "mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.2."}
    moved = {}
    for key, value in state.items():
        for ours, other in names.items():
            key = key.replace(ours, other)
        moved[key] = value
    theirs.load_state_dict(moved)
    images, mask = torch.randn(2, 3, 28, 28), torch.rand(2, 49).argsort(dim=1) < 19
    want = model(images, mask, target=torch.zeros(2, 49, dtype=torch.int64)).reconstruction
    got = theirs(images, mask).unflatten(0, (2, 19))
    assert split_ids(mask, 19)[1].shape == (2, 19)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_every_variant_is_a_recipe() -> None:
    for name in beit.VARIANTS:
        recipe = beit.recipe_of(name, ARGUMENTS, "zero0_fp32")
        assert recipe.num_masked == 19
        assert recipe.uses_teacher == (name != "beit")
