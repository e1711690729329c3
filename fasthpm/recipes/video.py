"""Video recipes: HPM on video (TPAMI 4.2, whose code was never released) and VideoMAE, its baseline.

As in `fasthpm.recipes`, the docstrings say where numbers come from: [paper], [released code] or [ours]; here the
released code is VideoMAE's, and, for what only HPM has, HPM's on images.
"""

from dataclasses import replace

from fasthpm.recipe import Recipe
from fasthpm.recipes.catalogue import recipe

BATCH = 2048  # clips per update


@recipe
def hpm_video_vit_base_ssv2_800e() -> Recipe:
    """HPM on video, ViT-B, Something-Something v2, 800 epochs. Paper: top-1 69.8. Ours: not yet run.

    deepspeed --module fasthpm.pretrain --recipe hpm_video_vit_base_ssv2_800e --data_path ssv2_train --output_dir OUT

    [paper] every frame slot is masked on its own, mask ratio 0.9, alpha 0 → 0.5, relative loss, tubelets of 2 x 16 x
    16, joint space-time attention; the rest "mostly follows VideoMAE". [released code] 16 frames, sampling rate 2;
    decoders 384 wide with 4 blocks and 6 heads (the loss predictor has the reconstructor's), targets normalised per
    patch and channel (norm_pix_loss); global batch 2048 (its paper: 1024), blr 1.5e-4, min lr 1e-5 per 256 clips, beta2
    0.95, weight decay 0.05, 40 warm-up epochs, no clipping (clip_grad; HPM on images: 5); EMA momentum 0.999 →
    0.9999 over 100 epochs and the alpha schedule are those of HPM on images. [ours] no mirroring (flip), because
    classes name directions.
    """
    return Recipe(
        recipe="hpm_video_vit_base_ssv2_800e",
        model="hpm_vit_base_patch16_224_video",
        num_frames=16,
        sampling_rate=2,
        tubelet_size=2,
        decoder_dim=384,
        decoder_depth=4,
        decoder_heads=6,
        mask_ratio=0.9,
        norm_pix_loss=True,
        batch_size=32,
        global_batch_size=BATCH,
        epochs=800,
        min_lr=1e-5 * BATCH / 256,
        clip_grad=0.0,
        flip=False,
    )


def _kinetics(base: Recipe, name: str) -> Recipe:
    return replace(base, recipe=name, sampling_rate=4, flip=True)


def _large(base: Recipe, name: str) -> Recipe:
    model = base.model.replace("_base_", "_large_")
    return replace(base, recipe=name, model=model, decoder_dim=512, decoder_depth=12, decoder_heads=8, batch_size=16)


@recipe
def hpm_video_vit_base_ssv2_2400e() -> Recipe:
    """HPM on video, ViT-B, Something-Something v2, 2400 epochs. Paper: top-1 71.3. Ours: not yet run."""
    return replace(hpm_video_vit_base_ssv2_800e(), recipe="hpm_video_vit_base_ssv2_2400e", epochs=2400)


@recipe
def hpm_video_vit_base_k400_800e() -> Recipe:
    """HPM on video, ViT-B, Kinetics-400, 800 epochs. Paper: top-1 80.8. Ours: not yet run.

    [released code] sampling rate 4. [ours] clips are mirrored at random. The rest as on Something-Something v2.
    """
    return _kinetics(hpm_video_vit_base_ssv2_800e(), "hpm_video_vit_base_k400_800e")


@recipe
def hpm_video_vit_base_k400_1600e() -> Recipe:
    """HPM on video, ViT-B, Kinetics-400, 1600 epochs. Paper: top-1 81.6. Ours: not yet run."""
    return replace(hpm_video_vit_base_k400_800e(), recipe="hpm_video_vit_base_k400_1600e", epochs=1600)


@recipe
def hpm_video_vit_large_ssv2_800e() -> Recipe:
    """HPM on video, ViT-L, Something-Something v2, 800 epochs. No paper reports it; ours: not yet run.

    [released code] decoders of VideoMAE's ViT-L: 512 wide (decoder_dim), 8 heads (decoder_heads). [paper] 12 blocks
    (decoder_depth). [ours] batch_size. The rest as for ViT-B.
    """
    return _large(hpm_video_vit_base_ssv2_800e(), "hpm_video_vit_large_ssv2_800e")


@recipe
def hpm_video_vit_large_ssv2_2400e() -> Recipe:
    """HPM on video, ViT-L, Something-Something v2, 2400 epochs. No paper reports it; ours: not yet run."""
    return replace(hpm_video_vit_large_ssv2_800e(), recipe="hpm_video_vit_large_ssv2_2400e", epochs=2400)


@recipe
def hpm_video_vit_large_k400_800e() -> Recipe:
    """HPM on video, ViT-L, Kinetics-400, 800 epochs. No paper reports it; ours: not yet run."""
    return _large(hpm_video_vit_base_k400_800e(), "hpm_video_vit_large_k400_800e")


@recipe
def hpm_video_vit_large_k400_1600e() -> Recipe:
    """HPM on video, ViT-L, Kinetics-400, 1600 epochs. No paper reports it; ours: not yet run."""
    return replace(hpm_video_vit_large_k400_800e(), recipe="hpm_video_vit_large_k400_1600e", epochs=1600)


@recipe
def videomae_vit_base_ssv2_800e() -> Recipe:
    """VideoMAE, ViT-B, Something-Something v2, 800 epochs. Paper (TPAMI's table): top-1 69.3. Ours: not yet run.

    [paper] tube masks: one mask for all frame slots (mask_policy); no teacher, no loss predictor (predict_loss). The
    rest as in hpm_video_vit_base_ssv2_800e.
    """
    return replace(
        hpm_video_vit_base_ssv2_800e(),
        recipe="videomae_vit_base_ssv2_800e",
        model="videomae_vit_base_patch16_224",
        mask_policy="tube",
        predict_loss="none",
    )


@recipe
def videomae_vit_base_ssv2_2400e() -> Recipe:
    """VideoMAE, ViT-B, Something-Something v2, 2400 epochs. Paper (TPAMI's table): top-1 70.8. Ours: not yet run."""
    return replace(videomae_vit_base_ssv2_800e(), recipe="videomae_vit_base_ssv2_2400e", epochs=2400)


@recipe
def videomae_vit_base_k400_800e() -> Recipe:
    """VideoMAE, ViT-B, Kinetics-400, 800 epochs. Paper (TPAMI's table): top-1 80.0. Ours: not yet run.

    [released code] sampling rate 4. [ours] clips are mirrored at random. The rest as on Something-Something v2.
    """
    return _kinetics(videomae_vit_base_ssv2_800e(), "videomae_vit_base_k400_800e")


@recipe
def videomae_vit_base_k400_1600e() -> Recipe:
    """VideoMAE, ViT-B, Kinetics-400, 1600 epochs. Paper (TPAMI's table): top-1 81.5. Ours: not yet run."""
    return replace(videomae_vit_base_k400_800e(), recipe="videomae_vit_base_k400_1600e", epochs=1600)


@recipe
def videomae_vit_large_ssv2_800e() -> Recipe:
    """VideoMAE, ViT-L, Something-Something v2, 800 epochs. No paper reports it; ours: not yet run.

    [released code] decoders of VideoMAE's ViT-L: 512 wide (decoder_dim), 8 heads (decoder_heads). [paper] 12 blocks
    (decoder_depth). [ours] batch_size. The rest as for ViT-B.
    """
    return _large(videomae_vit_base_ssv2_800e(), "videomae_vit_large_ssv2_800e")


@recipe
def videomae_vit_large_ssv2_2400e() -> Recipe:
    """VideoMAE, ViT-L, Something-Something v2, 2400 epochs. Paper (TPAMI's table): top-1 74.3. Ours: not yet run."""
    return replace(videomae_vit_large_ssv2_800e(), recipe="videomae_vit_large_ssv2_2400e", epochs=2400)


@recipe
def videomae_vit_large_k400_800e() -> Recipe:
    """VideoMAE, ViT-L, Kinetics-400, 800 epochs. No paper reports it; ours: not yet run."""
    return _large(videomae_vit_base_k400_800e(), "videomae_vit_large_k400_800e")


@recipe
def videomae_vit_large_k400_1600e() -> Recipe:
    """VideoMAE, ViT-L, Kinetics-400, 1600 epochs. Paper (TPAMI's table): top-1 85.2. Ours: not yet run."""
    return replace(videomae_vit_large_k400_800e(), recipe="videomae_vit_large_k400_1600e", epochs=1600)


@recipe
def hpm_video_demo() -> Recipe:
    """HPM on moving Fashion-MNIST garments, a nano video ViT: minutes on two CPU cores (`make video_demo`).

    Ours: k-NN on 8 classes of motion 52.5, untrained 26.5.

    deepspeed --module fasthpm.pretrain --recipe hpm_video_demo --data_path data/moving/train --output_dir runs/video

    Everything but the method is [ours]: 4 frames of 24 x 24 raw pixels, 0.6 masked; tubelets of one frame, so that no
    token sees motion by itself, and the mean over an untrained encoder's tokens says little about it.
    """
    return Recipe(
        recipe="hpm_video_demo",
        model="hpm_vit_nano_patch8_32_video",
        input_size="24",
        patch_size=6,
        channels=1,
        num_frames=4,
        sampling_rate=3,
        tubelet_size=1,
        mask_ratio=0.6,
        decoder_dim=64,
        decoder_depth=2,
        decoder_heads=4,
        batch_size=32,
        global_batch_size=64,
        epochs=128,
        warmup_epochs=5,
        lr=2e-3,
        flip=False,
        video_decoder="dali",
        ema_momentum=0.99,
        ema_momentum_end=0.999,
        ema_ramp_epochs=64,
        log_every=50,
        save_every=32,
        panel_every=32,
    )
