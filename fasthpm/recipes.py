"""One short function per published run: command, the paper's number, ours or "not yet run".

`from_name("hpm_vit_base_in1k_200e")` builds one; every number can be overridden on the command line.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fasthpm.errors import UserError, nearest
from fasthpm.recipe import Recipe, load_recipe


def hpm_vit_base_in1k_200e() -> Recipe:
    """HPM, ViT-B/16, ImageNet-1K, 200 epochs.

    deepspeed --module fasthpm.pretrain --recipe hpm_vit_base_in1k_200e --data_path in1k_train.beton --output_dir OUT

    Global batch 2048, blr 1.5e-4, gradient norm clipped at 5, EMA 0.999 → 0.9999 over 100 epochs (released
    PRETRAIN.md and code). Paper (TPAMI): fine-tune 82.95, linear 54.92, k-NN 36.09. Ours: not yet run.
    """
    return Recipe(recipe="hpm_vit_base_in1k_200e", batch_size=256, global_batch_size=2048)


def hpm_vit_base_in1k_800e() -> Recipe:
    """HPM, ViT-B/16, ImageNet-1K, 800 epochs. Paper: fine-tune 84.2. Ours: not yet run."""
    return replace(hpm_vit_base_in1k_200e(), recipe="hpm_vit_base_in1k_800e", epochs=800)


def hpm_vit_large_in1k_200e() -> Recipe:
    """HPM, ViT-L/16, ImageNet-1K, 200 epochs. Paper: fine-tune 84.5. Ours: not yet run."""
    return replace(hpm_vit_base_in1k_200e(), recipe="hpm_vit_large_in1k_200e", model="hpm_vit_large_patch16_224")


def hpm_vit_large_in1k_800e() -> Recipe:
    """HPM, ViT-L/16, ImageNet-1K, 800 epochs. Paper: fine-tune 85.8. Ours: not yet run."""
    return replace(hpm_vit_large_in1k_200e(), recipe="hpm_vit_large_in1k_800e", epochs=800)


def mae_vit_base_in1k_200e() -> Recipe:
    """MAE, ViT-B/16, ImageNet-1K, 200 epochs: random masks, no teacher, no loss predictor; the papers' baseline.

    The same batch, schedule and raw-pixel target as HPM's, and no clipping, as in MAE. Paper: fine-tune 82.23, linear
    50.80, k-NN 29.84. Ours: not yet run.
    """
    return replace(
        hpm_vit_base_in1k_200e(),
        recipe="mae_vit_base_in1k_200e",
        model="mae_vit_base_patch16_224",
        mask_policy="random",
        predict_loss="none",
        clip_grad=0.0,
    )


def hpm_demo() -> Recipe:
    """HPM on Fashion-MNIST, a nano ViT with 4-pixel patches: minutes on two CPU cores (`make demo`).

    deepspeed --module fasthpm.pretrain --recipe hpm_demo --data_path data/train.beton --output_dir runs/demo

    Raw pixels as in HPM's scripts: with `norm_pix_loss` the teacher's difficulty turned against the true loss here
    (bench/LOG.md). Small batches, because in so short a run the number of updates counts; the momentum is lower than
    the papers' because the run is a thousand times shorter.
    """
    return Recipe(
        recipe="hpm_demo", model="hpm_vit_nano_patch4_28", input_size="28", patch_size=4, channels=1,
        decoder_dim=64, decoder_depth=2, decoder_heads=2,
        batch_size=16, global_batch_size=32, epochs=4, steps_per_epoch=1500, warmup_epochs=0.2,
        lr=1e-3, crop_min=0.5, ema_momentum=0.99, ema_momentum_end=0.999, ema_ramp_epochs=4,
        log_every=50, save_every=1, panel_every=1,
    )  # fmt: skip


def debug() -> Recipe:
    """A toy run on synthetic images: no data, no GPU, seconds. For checking an installation or a change."""
    return Recipe(
        recipe="debug", model="hpm_vit_nano_patch4_28", input_size="28", patch_size=4, channels=1,
        decoder_dim=32, decoder_depth=1, decoder_heads=4, data_path="synthetic:128",
        batch_size=8, epochs=2, warmup_epochs=0.5, lr=1e-3, log_every=4, save_every=1, panel_every=1,
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__: function
    for function in (
        hpm_vit_base_in1k_200e,
        hpm_vit_base_in1k_800e,
        hpm_vit_large_in1k_200e,
        hpm_vit_large_in1k_800e,
        mae_vit_base_in1k_200e,
        hpm_demo,
        debug,
    )
}


def from_name(name: str) -> Recipe:
    """A published recipe, or the recipe.json of an earlier run (a path that ends in .json).

    **Raises:** `UserError` naming the nearest recipe.
    """
    if name.endswith(".json"):
        return load_recipe(Path(name))
    if name not in RECIPES:
        raise UserError(
            f"unknown recipe {name!r}{nearest(name, RECIPES)}; expected one of {', '.join(RECIPES)}, or "
            f"the recipe.json of a run"
        )
    return RECIPES[name]()
