"""One short function per published run: command, the paper's number, ours or "not yet run".

`from_name("hpm_vit_base_in1k_200e")` builds one; every number can be overridden on the command line. The docstrings
say where the numbers come from: [paper], [released code] or [ours]; where they disagree, the flag that gives the other.
"""

from dataclasses import replace

from fasthpm.recipe import Recipe
from fasthpm.recipes.catalogue import recipe

FAST_REFRESH_EPOCHS = 10  # of the difficulty maps in the fast preset


@recipe
def hpm_vit_base_in1k_200e() -> Recipe:
    """HPM, ViT-B/16, ImageNet-1K, 200 epochs.

    deepspeed --module fasthpm.pretrain --recipe hpm_vit_base_in1k_200e --data_path in1k_train.beton --output_dir OUT

    Paper (TPAMI): fine-tune 82.95, linear 54.92, k-NN 36.09. Ours: not yet run.

    [paper] mask ratio 0.75, alpha 0 → 0.5, relative loss, two decoders of 8 blocks and 512 wide; MAE's AdamW, blr
    1.5e-4, weight decay 0.05, 40 epochs of warm-up, cosine. Other decoders: --decoder_depth and --decoder_dim for both,
    --predictor_depth and --predictor_dim for the loss predictor alone (paper: 1, 2, 4, 8, 12 and 128 … 1024).
    [released code] global batch 2048 (its PRETRAIN.md; its scripts: --global_batch_size 256); gradient norm clipped at
    5 (paper: no word, --clip_grad 0); raw pixels (--norm_pix_loss); EMA 0.999 → 0.9999 over 100 epochs (paper: one
    value, --ema_ramp_epochs 0 --ema_momentum_end M); alpha at (epoch + 1)/epochs (paper: --alpha_schedule paper).
    [ours] the exact log-sigmoid in the relative loss; no weight decay on cls and mask token.
    """
    return Recipe(recipe="hpm_vit_base_in1k_200e", batch_size=256, global_batch_size=2048)


@recipe
def hpm_vit_base_in1k_200e_fast() -> Recipe:
    """Fast HPM, ViT-B/16, ImageNet-1K, 200 epochs: below MAE's price by arithmetic. No paper reports it; ours: not yet
    run.

    [ours] teacher_maps: the teacher sees whole images every 10 epochs (map_refresh_epochs), masks follow its maps;
    predictor shared: a small head on the reconstructor instead of 8 blocks; decoder_attention cross: mask tokens alone
    go through the decoder. The rest as in hpm_vit_base_in1k_200e. Watch `map_spearman` and `teacher_spearman`.
    """
    return fast(hpm_vit_base_in1k_200e(), "hpm_vit_base_in1k_200e_fast", FAST_REFRESH_EPOCHS)


def fast(recipe: Recipe, name: str, refresh_epochs: int) -> Recipe:
    """The fast modes that cost least, on another recipe."""
    return replace(
        recipe,
        recipe=name,
        difficulty="masked_query",
        teacher_maps=True,
        map_refresh_epochs=refresh_epochs,
        predictor="shared",
        decoder_attention="cross",
    )


@recipe
def hpm_vit_base_in1k_800e() -> Recipe:
    """HPM, ViT-B/16, ImageNet-1K, 800 epochs. Paper: fine-tune 84.2. Ours: not yet run."""
    return replace(hpm_vit_base_in1k_200e(), recipe="hpm_vit_base_in1k_800e", epochs=800)


@recipe
def hpm_vit_large_in1k_200e() -> Recipe:
    """HPM, ViT-L/16, ImageNet-1K, 200 epochs. Paper: fine-tune 84.5. Ours: not yet run."""
    return replace(hpm_vit_base_in1k_200e(), recipe="hpm_vit_large_in1k_200e", model="hpm_vit_large_patch16_224")


@recipe
def hpm_vit_large_in1k_800e() -> Recipe:
    """HPM, ViT-L/16, ImageNet-1K, 800 epochs. Paper: fine-tune 85.8. Ours: not yet run."""
    return replace(hpm_vit_large_in1k_200e(), recipe="hpm_vit_large_in1k_800e", epochs=800)


@recipe
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


@recipe
def mae_vit_large_in1k_200e() -> Recipe:
    """MAE, ViT-L/16, ImageNet-1K, 200 epochs. Paper (TPAMI's table): fine-tune 83.3. Ours: not yet run.

    Settings as in mae_vit_base_in1k_200e.
    """
    return replace(mae_vit_base_in1k_200e(), recipe="mae_vit_large_in1k_200e", model="mae_vit_large_patch16_224")


@recipe
def mae_losspred_vit_base_in1k_200e() -> Recipe:
    """MAE with a loss predictor: HPM with random masks, ViT-B/16, ImageNet-1K, 200 epochs. The papers' "random" rows.

    Paper: fine-tune 82.49, linear 51.26, k-NN 31.98. Ours: not yet run.

    [paper] random masks, relative loss. [released code], [ours]: as in hpm_vit_base_in1k_200e.
    """
    return replace(hpm_vit_base_in1k_200e(), recipe="mae_losspred_vit_base_in1k_200e", mask_policy="random")


@recipe
def hpm_absolute_vit_base_in1k_200e() -> Recipe:
    """HPM with the absolute loss, ViT-B/16, 200 epochs. Paper: fine-tune 82.77, linear 51.85, k-NN 34.47. Ours: not
    yet run.

    [paper] mean squared error of predicted and actual loss (Eq. 4). [released code] the actual loss standardised per
    image first (Eq. 4 as written: --no-absolute_standardize). The rest as in hpm_vit_base_in1k_200e.
    """
    return replace(hpm_vit_base_in1k_200e(), recipe="hpm_absolute_vit_base_in1k_200e", predict_loss="absolute")


@recipe
def hpm_argmin_vit_base_in1k_200e() -> Recipe:
    """Ablation: the easiest patches are masked, ViT-B/16, 200 epochs. Paper: fine-tune 82.36. Ours: not yet run.

    [paper] argmin, alpha 0 → 0.5. The rest as in hpm_vit_base_in1k_200e.
    """
    return replace(hpm_vit_base_in1k_200e(), recipe="hpm_argmin_vit_base_in1k_200e", mask_policy="hpm_easiest")


@recipe
def hpm_hard_to_easy_vit_base_in1k_200e() -> Recipe:
    """Ablation: hard to easy, alpha 0.5 → 0, ViT-B/16, 200 epochs. Paper: fine-tune 81.71. Ours: not yet run.

    [paper] alpha. The rest as in hpm_vit_base_in1k_200e.
    """
    return replace(
        hpm_vit_base_in1k_200e(), recipe="hpm_hard_to_easy_vit_base_in1k_200e", alpha_start=0.5, alpha_end=0.0
    )


@recipe
def hpm_all_hard_vit_base_in1k_200e() -> Recipe:
    """Ablation: only the hardest are masked, alpha 1 → 1, ViT-B/16, 200 epochs. Paper: fine-tune 81.40. Ours: not yet
    run.

    [paper] alpha. The rest as in hpm_vit_base_in1k_200e.
    """
    return replace(hpm_vit_base_in1k_200e(), recipe="hpm_all_hard_vit_base_in1k_200e", alpha_start=1.0, alpha_end=1.0)


@recipe
def mae_ema_vit_base_in1k_200e() -> Recipe:
    """MAE on EMA features, ViT-B/16, ImageNet-1K, 200 epochs. Paper: fine-tune 82.99, linear 32.65, k-NN 20.69. Ours:
    not yet run.

    [paper] target: features of the EMA teacher, squared distance after L2 normalisation. [ours] the encoder's output
    after its norm, no centring, a linear head from the decoder to its width (the released code's is fixed to CLIP's
    512). The rest as in mae_vit_base_in1k_200e.
    """
    return replace(mae_vit_base_in1k_200e(), recipe="mae_ema_vit_base_in1k_200e", target="ema")


@recipe
def hpm_ema_vit_base_in1k_200e() -> Recipe:
    """HPM on EMA features, ViT-B/16, ImageNet-1K, 200 epochs. Paper: fine-tune 83.47, linear 55.25, k-NN 35.94. Ours:
    not yet run.

    [paper] target: as in mae_ema_vit_base_in1k_200e, by the same teacher and the same pass that predicts the
    difficulty; with random masks (--mask_policy random) 83.13, 52.06, 35.73. The rest as in hpm_vit_base_in1k_200e.
    """
    return replace(hpm_vit_base_in1k_200e(), recipe="hpm_ema_vit_base_in1k_200e", target="ema")


@recipe
def mae_dino_vit_base_in1k_200e() -> Recipe:
    """MAE on DINO's features, ViT-B/16, ImageNet-1K, 200 epochs. Paper: fine-tune 83.46, linear 61.31, k-NN 41.53.
    Ours: not yet run.

    [paper] target: patch features of DINO's ViT-B/16, squared distance after L2 normalisation. [released code] they
    are those after the last norm, 768 wide. [ours] timm's copy of the weights (--target_weights FILE for another). The
    rest as in mae_vit_base_in1k_200e.
    """
    return replace(mae_vit_base_in1k_200e(), recipe="mae_dino_vit_base_in1k_200e", target="dino")


@recipe
def hpm_dino_vit_base_in1k_200e() -> Recipe:
    """HPM on DINO's features, ViT-B/16, ImageNet-1K, 200 epochs. Paper: fine-tune 84.13, linear 64.17, k-NN 47.25.
    Ours: not yet run.

    [paper] target: as in mae_dino_vit_base_in1k_200e; with random masks (--mask_policy random) 83.58, 63.25, 43.02.
    The rest as in hpm_vit_base_in1k_200e.
    """
    return replace(hpm_vit_base_in1k_200e(), recipe="hpm_dino_vit_base_in1k_200e", target="dino")


@recipe
def mae_clip_vit_base_in1k_200e() -> Recipe:
    """MAE on CLIP's features, ViT-B/16, ImageNet-1K, 200 epochs. Paper: fine-tune 83.20, linear 59.80, k-NN 42.51.
    Ours: not yet run.

    [paper] target: patch features of CLIP's ViT-B/16, squared distance after L2 normalisation. [released code] they
    are those after the last norm and the projection, 512 wide. [ours] timm's copy of OpenAI's weights
    (--target_weights FILE for another). The rest as in mae_vit_base_in1k_200e.
    """
    return replace(mae_vit_base_in1k_200e(), recipe="mae_clip_vit_base_in1k_200e", target="clip")


@recipe
def hpm_clip_vit_base_in1k_200e() -> Recipe:
    """HPM on CLIP's features, ViT-B/16, ImageNet-1K, 200 epochs. Paper: fine-tune 83.58, linear 62.22, k-NN 45.08.
    Ours: not yet run.

    [paper] target: as in mae_clip_vit_base_in1k_200e; with random masks (--mask_policy random) 83.31, 60.62, 43.26.
    The rest as in hpm_vit_base_in1k_200e.
    """
    return replace(hpm_vit_base_in1k_200e(), recipe="hpm_clip_vit_base_in1k_200e", target="clip")


@recipe
def simmim_vit_base_in1k_800e() -> Recipe:
    """SimMIM, ViT-B/16, ImageNet-1K, 800 epochs. Paper: fine-tune 83.8. Ours: not yet run.

    [paper] mask tokens in the encoder, random units of 32 x 32 pixels, ratio 0.6, linear head, l1 on masked pixels;
    crops from 0.67 of the area. [released code] AdamW betas 0.9 and 0.999, global batch 2048, lr 1e-4 per 512 images,
    10 epochs of warm-up, clipping at 5, lowest lr 2e-5; not reproduced: a tenth of the rate for the last 100 epochs
    instead of a cosine, drop path 0.1, relative positions, LayerScale. [ours] the cosine; sine-cosine positions (the
    AMT paper's SimMIM has absolute ones too).
    """
    return Recipe(
        recipe="simmim_vit_base_in1k_800e",
        model="simmim_vit_base_patch16_224",
        mask_policy="random",
        mask_ratio=0.6,
        mask_unit=32,
        predict_loss="none",
        pixel_loss="l1",
        batch_size=128,
        global_batch_size=2048,
        epochs=800,
        warmup_epochs=10,
        blr=5e-5,
        min_lr=2e-5,
        beta2=0.999,
        crop_min=0.67,
    )


@recipe
def hpm_simmim_vit_base_in1k_800e() -> Recipe:
    """HPM on SimMIM, ViT-B/16, ImageNet-1K, 800 epochs. No paper reports it; ours: not yet run.

    [paper] HPM is "plug-and-play": a loss predictor beside the reconstructor, its teacher masks; alpha 0 → 0.5,
    relative loss (TPAMI adds it to BEiT and iBOT too, not to SimMIM). The rest as in simmim_vit_base_in1k_800e.
    [ours] the predictor is 2 blocks, 512 wide, on the encoder's output; a unit is as hard as its patches on average.
    """
    return replace(
        simmim_vit_base_in1k_800e(),
        recipe="hpm_simmim_vit_base_in1k_800e",
        mask_policy="hpm",
        predict_loss="relative",
        predictor_depth=2,
    )


@recipe
def amt_mae_vit_base_in1k_400e() -> Recipe:
    """AMT on MAE, ViT-B/16, ImageNet-1K, 400 epochs. Paper: fine-tune 82.8, linear 61.7 (MAE: 82.6, 56.6). Ours: not
    yet run.

    [paper] 45 % masked, 40 % thrown away, by the last block's attention of the cls token, averaged over heads, scaled
    to [0, 1], made anew every 40 epochs on whole images; cropped and flipped with the image; the rest is MAE's: blr
    1.5e-4, batch 4096, 40 epochs of warm-up, normalised pixels. [released code] random masks of 75 % until the first
    maps; it crops the map wrongly and scales each head before the average (--map_crop reference --map_per_head), and
    makes the maps at the end of epochs 40, 80 …, one epoch later than here. [ours] bilinear reading at patch centres.
    """
    return replace(
        mae_vit_base_in1k_200e(),
        recipe="amt_mae_vit_base_in1k_400e",
        epochs=400,
        global_batch_size=4096,
        norm_pix_loss=True,
        mask_policy="attention",
        mask_ratio=0.45,
        throw_ratio=0.4,
    )


@recipe
def amt_mae_mask_only_vit_base_in1k_400e() -> Recipe:
    """AMT on MAE without throwing, ViT-B/16, ImageNet-1K, 400 epochs. Paper: fine-tune 82.5, linear 61.5. Ours: not
    yet run.

    [paper] 75 % masked by attention, nothing thrown away. The rest as in amt_mae_vit_base_in1k_400e.
    """
    return replace(
        amt_mae_vit_base_in1k_400e(), recipe="amt_mae_mask_only_vit_base_in1k_400e", mask_ratio=0.75, throw_ratio=0.0
    )


@recipe
def amt_simmim_vit_base_in1k_200e() -> Recipe:
    """AMT on SimMIM, ViT-B/16, ImageNet-1K, 200 epochs. Paper: fine-tune 80.7 (SimMIM: 81.5). Ours: not yet run.

    [paper] 44 % masked and 26 % thrown away of units of 32 x 32 pixels; a unit weighs what its patches weigh.
    [released code] counts rounded up: 22 and 13 of 49 units; random masks of 60 % until the first maps (it then stops
    with an error). The rest as in simmim_vit_base_in1k_800e, the maps as in amt_mae_vit_base_in1k_400e.
    """
    return replace(
        simmim_vit_base_in1k_800e(),
        recipe="amt_simmim_vit_base_in1k_200e",
        epochs=200,
        mask_policy="attention",
        mask_ratio=0.44,
        throw_ratio=0.26,
        warmup_mask_ratio=0.6,
    )


@recipe
def hpm_demo() -> Recipe:
    """HPM on Fashion-MNIST, a nano ViT with 4-pixel patches: minutes on two CPU cores (`make demo`).

    deepspeed --module fasthpm.pretrain --recipe hpm_demo --data_path data/train.beton --output_dir runs/demo

    Ours (two CPU cores): k-NN with 10,000 voters 79.1, untrained 67.4; difficulty_spearman 0.84.

    [ours] difficulty measured, without a loss predictor: the teacher reconstructs each patch where it is masked, at two
    thirds of the paper's price (--difficulty paper --predict_loss relative: as published). Raw pixels as in HPM's
    scripts. The momentum is lower than the papers' because the run is a thousand times shorter.
    """
    return Recipe(
        recipe="hpm_demo",
        model="hpm_vit_nano_patch4_28",
        input_size="28",
        patch_size=4,
        channels=1,
        decoder_dim=64,
        decoder_depth=2,
        decoder_heads=4,
        predict_loss="none",
        difficulty="measured",
        batch_size=32,
        global_batch_size=64,
        epochs=4,
        steps_per_epoch=800,
        warmup_epochs=0.2,
        lr=1e-3,
        crop_min=0.5,
        ema_momentum=0.99,
        ema_momentum_end=0.999,
        ema_ramp_epochs=4,
        log_every=50,
        save_every=1,
        panel_every=1,
    )


@recipe
def hpm_demo_fast() -> Recipe:
    """Fast HPM on Fashion-MNIST: the demo with the fast modes; [ours] maps refreshed in every epoch.

    deepspeed --module fasthpm.pretrain --recipe hpm_demo_fast --data_path data/train.beton --output_dir runs/fast
    """
    return fast(replace(hpm_demo(), difficulty="paper", predict_loss="relative"), "hpm_demo_fast", 1)


@recipe
def hpm_dense_demo() -> Recipe:
    """HPM on garments on photographs, a nano ViT with 8-pixel patches at 96 px: what `make dense_demo` begins with.

    deepspeed --module fasthpm.pretrain --recipe hpm_dense_demo --data_path scenes.beton --output_dir runs/dense_demo

    Ours (two CPU cores): mIoU 8.5 and mask AP 4.7 after 600 and 240 updates; difficulty_spearman 0.90. After 24 epochs
    three seeds have mIoU 8.9 and mask AP 10.5 (300 updates), from scratch 7.8 and 6.7 (`bench.evidence_dense`).

    [ours] the demo's numbers for larger images in colour, by whole epochs (of 8,000 images: 625 updates), with pixels
    normalised per patch; a teacher with a shorter memory, because there are fewer updates, whose maps are kept for two
    epochs; a cross decoder. The last two halve the time.
    """
    return replace(
        hpm_demo(),
        recipe="hpm_dense_demo",
        input_size="96",
        patch_size=8,
        channels=3,
        epochs=5,
        steps_per_epoch=0,
        warmup_epochs=0.5,
        ema_momentum_end=0.99,
        ema_ramp_epochs=5,
        norm_pix_loss=True,
        decoder_attention="cross",
        teacher_maps=True,
        map_refresh_epochs=2,
        panel_every=5,
    )


@recipe
def debug() -> Recipe:
    """A toy run on synthetic images: no data, no GPU, seconds. For checking an installation or a change."""
    return Recipe(
        recipe="debug",
        model="hpm_vit_nano_patch4_28",
        input_size="28",
        patch_size=4,
        channels=1,
        decoder_dim=32,
        decoder_depth=1,
        decoder_heads=4,
        data_path="synthetic:128",
        batch_size=8,
        epochs=2,
        warmup_epochs=0.5,
        lr=1e-3,
        log_every=4,
        save_every=1,
        panel_every=1,
    )
