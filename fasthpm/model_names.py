"""The registered models: their names, and what a name says of sizes, layout and method."""

from typing import Any

from fasthpm.errors import UserError, nearest

VIDEO_FRAMES, VIDEO_TUBELET = 16, 2  # VideoMAE's
SIZES: dict[str, dict[str, int]] = {
    "pico": {"embed_dim": 32, "depth": 4, "num_heads": 2},  # for tests: quick even where bf16 is emulated
    "nano": {"embed_dim": 128, "depth": 4, "num_heads": 4},  # for tests and laptops
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
LAYOUTS: dict[str, tuple[tuple[int, int], ...]] = {  # size: (patch side, image side) …
    "pico": ((4, 28),),
    "nano": ((4, 28),),
    "tiny": ((16, 224), (4, 28)),
    "small": ((16, 224),),
    "base": ((16, 224),),
    "large": ((16, 224),),
    "huge": ((14, 224),),
}
VIDEO_LAYOUTS: dict[str, tuple[tuple[int, int], ...]] = {  # the same, of 16 frames in slots of 2
    "pico": ((8, 32),),
    "nano": ((8, 32),),
    "small": ((16, 224),),
    "base": ((16, 224),),
    "large": ((16, 224),),
    "huge": ((16, 224),),
}


METHODS: dict[str, dict[str, Any]] = {
    "hpm": {},
    "mae": {"predict_loss": "none"},
    "simmim": {"predict_loss": "none", "encoder_mask_tokens": True, "pixel_loss": "l1"},
    "beit": {"predict_loss": "none", "encoder_mask_tokens": True, "init": "beit"},
    "ibot": {"predict_loss": "none", "encoder_mask_tokens": True, "init": "dino", "head_hidden": 2048},
    "videomae": {"predict_loss": "none"},
}
VIDEO: dict[str, Any] = {
    "video": True,
    "num_frames": VIDEO_FRAMES,
    "tubelet_size": VIDEO_TUBELET,
    "norm_pix_loss": True,
}


def model_names() -> list[str]:
    """All registered names: {hpm,mae,simmim,beit,ibot}_vit_{size}_patch{P}_{input} for images; for videos hpm_…_video
    and videomae_vit_…."""
    return [
        f"{method}_vit_{size}_patch{patch}_{side}{suffix}"
        for method, suffix, table in (
            *((name, "", LAYOUTS) for name in METHODS if name != "videomae"),
            ("hpm", "_video", VIDEO_LAYOUTS),
            ("videomae", "", VIDEO_LAYOUTS),
        )
        for size, layouts in table.items()
        for patch, side in layouts
    ]


def is_video(name: str) -> bool:
    """Whether a registered model takes clips."""
    return name.endswith("_video") or name.startswith("videomae_")


def width_of(name: str) -> int:
    """Width D of the encoder of a registered name. **Raises:** `UserError` for an unknown one."""
    check_name(name)
    return SIZES[name.split("_")[2]]["embed_dim"]


def check_name(name: str) -> None:
    """**Raises:** `UserError` for an unknown name, naming the nearest."""
    names = model_names()
    if name not in names:
        raise UserError(f"unknown model {name!r}{nearest(name, names)}; expected one of {', '.join(names)}")


def video_decoder(size: str) -> dict[str, int]:
    """VideoMAE's decoders: half the encoder's width (released code, width x heads: S 192x3, B 384x6, L 512x8, H 640x8);
    4 blocks, for L 12."""
    width = SIZES[size]["embed_dim"] // 2
    heads, depth = min(max(width // 64, 1), 8), 12 if size == "large" else 4
    return {"decoder_embed_dim": width, "decoder_num_heads": heads, "decoder_depth": depth}
