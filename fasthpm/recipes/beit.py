"""BEiT, plain and with HPM's masks and difficulty. See `images` for how docstrings say where numbers come from."""

from dataclasses import replace

from fasthpm.recipe import Recipe
from fasthpm.recipes.catalogue import recipe
from fasthpm.recipes.images import hpm_demo

DEMO_TOKENS = 256


@recipe
def beit_vit_base_in1k_800e() -> Recipe:
    """BEiT, ViT-B/16, ImageNet-1K, 800 epochs. Paper: fine-tune 83.2. Ours: not yet run.

    deepspeed --module fasthpm.pretrain --recipe beit_vit_base_in1k_800e --data_path in1k_train.beton --output_dir OUT
    --target_weights dvae:FOLDER (or vqkd:FILE, or kmeans:FILE with --target_dim)

    [paper] ids of DALL-E's 8,192 tokens, cross-entropy on masked patches; blocks of patches are masked; mask tokens in
    the encoder, linear head; AdamW, batch 2048, lr 1.5e-3, 10 epochs of warm-up, cosine, weight decay 0.05, drop path
    0.1. [released code] 75 of 196 patches: exactly (there at most, 74.5 on average, from 65); learned positions and no
    LayerScale, its released variant (--positions relative --layer_scale 0.1: the usual one; a bias on the scores costs
    the flash kernel); weights normal, 0.02, cut off, and divided by sqrt(2 layer) where a branch ends; betas 0.9 and
    0.999, clipping at 3, lowest lr 1e-5, colour jitter 0.4, crops from 0.08 of the area. [ours] the tokenizer sees the
    crop made smaller by a bicubic filter, not a second resize; pixels by the data's own mean and deviation; no weight
    decay on the mask token.
    """
    return Recipe(
        recipe="beit_vit_base_in1k_800e",
        model="beit_vit_base_patch16_224",
        positions="learned",
        drop_path=0.1,
        target="tokens",
        mask_policy="blockwise",
        mask_ratio=0.38,
        predict_loss="none",
        batch_size=128,
        global_batch_size=2048,
        epochs=800,
        warmup_epochs=10,
        lr=1.5e-3,
        min_lr=1e-5,
        beta2=0.999,
        clip_grad=3.0,
        color_jitter=0.4,
        crop_min=0.08,
    )


@recipe
def beit_vit_large_in1k_800e() -> Recipe:
    """BEiT, ViT-L/16, ImageNet-1K, 800 epochs. Paper: fine-tune 85.2. Ours: not yet run.

    [released code] its usual variant has relative positions and LayerScale from 1e-5. The rest as in
    beit_vit_base_in1k_800e.
    """
    return replace(
        beit_vit_base_in1k_800e(), recipe="beit_vit_large_in1k_800e", model="beit_vit_large_patch16_224", batch_size=64
    )


@recipe
def hpm_beit_vit_base_in1k_200e() -> Recipe:
    """HPM on BEiT, ViT-B/16, ImageNet-1K, 200 epochs. Paper's number not at hand; ours: not yet run.

    [paper] 200 epochs of BEiT with HPM (no code was released, nor are mask ratio, alpha and predictor told); alpha 0 →
    0.5, relative loss, of the tokens' cross-entropy. [ours] patches are masked one by one, BEiT's blocks given up
    (hpm_beit_units_vit_base_in1k_200e keeps squares of 32 pixels); the predictor is 2 blocks, 512 wide, on the
    encoder's output (--difficulty in_place --predict_loss none: a small head instead). The rest as in
    beit_vit_base_in1k_800e.
    """
    return replace(
        beit_vit_base_in1k_800e(),
        recipe="hpm_beit_vit_base_in1k_200e",
        epochs=200,
        mask_policy="hpm",
        predict_loss="relative",
        predictor_depth=2,
    )


@recipe
def hpm_beit_units_vit_base_in1k_200e() -> Recipe:
    """HPM on BEiT in units, ViT-B/16, ImageNet-1K, 200 epochs. No paper reports it; ours: not yet run.

    [ours] squares of 32 x 32 pixels are masked as a whole, 19 of 49 (76 patches); a unit is as hard as its patches on
    average. The rest as in hpm_beit_vit_base_in1k_200e.
    """
    return replace(hpm_beit_vit_base_in1k_200e(), recipe="hpm_beit_units_vit_base_in1k_200e", mask_unit=32)


@recipe
def beit_demo() -> Recipe:
    """BEiT on Fashion-MNIST with a k-means codebook of its own patches: minutes on two CPU cores.

    python -m data_prep.codebook data/train.beton book.safetensors --size 256 --patch_size 4 --input_size 28
    --channels 1, then
    deepspeed --module fasthpm.pretrain --recipe beit_demo --target_weights kmeans:book.safetensors
    --data_path data/train.beton --output_dir runs/beit

    Ours (640 updates of 32, 3 seeds, `bench.evidence_beit`): k-NN 73.3 ± 0.7, random masks 72.9 ± 1.5, untrained 45.8.

    [ours] the demo's sizes, rates and crops, 256 tokens; masks, initial values, betas and clipping as in
    beit_vit_base_in1k_800e; sine-cosine positions, because learned ones begin near zero and learn slowly; no drop path
    and no colour jitter, for a run this short.
    """
    base = beit_vit_base_in1k_800e()
    kept = ("target", "mask_policy", "mask_ratio", "predict_loss", "beta2", "clip_grad")
    return replace(
        hpm_demo(),
        recipe="beit_demo",
        model="beit_vit_nano_patch4_28",
        target_dim=DEMO_TOKENS,
        difficulty="paper",
        **{name: getattr(base, name) for name in kept},
    )


@recipe
def hpm_beit_demo() -> Recipe:
    """HPM on BEiT on Fashion-MNIST.

    Ours (640 updates of 32, 3 seeds, `bench.evidence_beit`): k-NN 73.8 ± 0.5, +0.9 ± 1.8 over random masks (ahead in
    2); difficulty_spearman 0.94.

    Command as of beit_demo, with --recipe hpm_beit_demo. [ours] difficulty measured, without a loss predictor, as in
    hpm_demo. The rest as in beit_demo.
    """
    return replace(beit_demo(), recipe="hpm_beit_demo", mask_policy="hpm", difficulty="measured")
