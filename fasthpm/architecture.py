"""What a model is made of, in one record; `fasthpm.model` makes it."""

from dataclasses import dataclass

from fasthpm.difficulty import DIFFICULTIES
from fasthpm.errors import UserError, nearest
from fasthpm.objectives import PIXELS, Objective


@dataclass(frozen=True)
class Architecture:
    """What an `HPMViT` is made of.

    - `img_size`: side or (height, width) in pixels, multiples of `patch_size`
    - `num_frames`, `tubelet_size`: frames of a clip, and of a patch; more than one frame needs `video`
    - `predict_loss`: "relative", "absolute" or "none" (no predictor: MAE)
    - `predictor_dim`, `predictor_depth`: of the loss predictor; 0 = the decoder's. Another width than that of the
      tokens that it reads (of the decoder, in SimMIM of the encoder) costs one linear map
    - `predictor`: "separate", or "shared": a norm and a linear head on the reconstructor's blocks instead of blocks of
      its own (the CVPR paper's open question)
    - `decoder_attention`: "self", or "cross": only mask tokens go through the decoders; in every block they attend to
      cls and visible tokens as those enter the decoder (after CrossMAE, arXiv 2401.14391), not to each other.
      Parameters have the same names and shapes
    - `difficulty`: how `predict_loss` answers, a name in `fasthpm.difficulty.DIFFICULTIES`. Cross decoders know no
      question but masked_query: it is what "paper" means for them
    - `mask_ratio`, `mask_unit` (side in patches): of the student's masks, which some questions imitate
    - `encoder_mask_tokens`, `video`: SimMIM, VideoMAE; see `HPMViT`
    - `pixel_loss`: "mse" or "l1"; `absolute_standardize`, `norm_pix_loss`: see `fasthpm.loss`
    - `norm_pix_channels`: `norm_pix_loss` of every channel by itself, as of videos
    - `objective`: what is predicted of masked patches, and by which loss
    - `positions`: of the encoder's tokens: "sincos", "learned" or "relative" (BEiT; with mask tokens in it)
    - `layer_scale`: first value of the weights that scale the encoder's branches; 0 = there are none
    - `head_hidden`: width of a projection head in the place of the last linear layer (iBOT); 0 = there is none;
      `head_free_norm`: see `projection.ProjectionHead`
    - `init`: initial values, "mae", "beit" or "dino"
    - `activation_checkpointing`: keep only the blocks' inputs and compute the rest again in the backward pass

    **Raises:** `UserError` for sizes that do not fit together.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    predictor_dim: int = 0
    predictor_depth: int = 0
    predictor: str = "separate"
    decoder_attention: str = "self"
    encoder_mask_tokens: bool = False
    predict_loss: str = "relative"
    difficulty: str = "paper"
    mask_ratio: float = 0.75
    mask_unit: int = 1
    absolute_standardize: bool = True
    pixel_loss: str = "mse"
    norm_pix_loss: bool = False
    norm_pix_channels: bool = False
    objective: Objective = PIXELS
    num_frames: int = 1
    tubelet_size: int = 1
    video: bool = False
    positions: str = "sincos"
    layer_scale: float = 0.0
    init: str = "mae"
    head_hidden: int = 0
    head_free_norm: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.difficulty not in DIFFICULTIES:
            raise UserError(
                f"difficulty is {self.difficulty!r}, expected one of {', '.join(DIFFICULTIES)}"
                f"{nearest(self.difficulty, list(DIFFICULTIES))}"
            )
        if self.encoder_mask_tokens and (self.predictor == "shared" or self.decoder_attention == "cross"):
            raise UserError("SimMIM has no decoder blocks: use predictor separate and decoder_attention self with it")
        if self.positions != "sincos" and self.video:
            raise UserError(f"positions {self.positions} are of images, and this is a video model; use sincos")
        if self.positions == "relative" and not self.encoder_mask_tokens:
            raise UserError("relative positions need a model whose encoder sees all places (simmim_…, beit_…)")
        if any(side % self.patch_size for side in self.image_size):
            raise UserError(
                f"image size {self.image_size} is not a multiple of patch_size {self.patch_size}; choose sides that are"
            )
        if not self.video and (self.num_frames, self.tubelet_size) != (1, 1):
            raise UserError(
                f"an image model has one frame, not {self.num_frames} in tubelets of {self.tubelet_size}; use a video "
                f"model (its name ends in _video, or begins with videomae_)"
            )
        if self.num_frames % self.tubelet_size:
            raise UserError(
                f"{self.num_frames} frames are not a multiple of tubelet_size {self.tubelet_size}; choose one that is"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        return (
            (self.img_size, self.img_size) if isinstance(self.img_size, int) else (self.img_size[0], self.img_size[1])
        )

    @property
    def decoder_width(self) -> int:
        """Width of the tokens that reconstructor and loss predictor read."""
        return self.embed_dim if self.encoder_mask_tokens else self.decoder_embed_dim
