"""The fields of a recipe: type, default, help, range and origin of each side by side."""

from dataclasses import dataclass

from fasthpm.data.sampling import INTERPOLATIONS, SAMPLE_ORDERS
from fasthpm.data.values import MAX_CHANNELS
from fasthpm.data.video.sampling import DECODERS
from fasthpm.difficulty import DIFFICULTIES
from fasthpm.mask import MAP_CROPS, POLICIES
from fasthpm.options import OURS, PAPER, RELEASED, option
from fasthpm.targets import TARGETS

PREDICT_LOSSES = ("relative", "absolute", "none")
PIXEL_LOSSES = ("mse", "l1")
PREDICTORS = ("separate", "shared")
DECODER_ATTENTIONS = ("self", "cross")
POSITIONS = ("sincos", "learned", "relative")
ALPHA_SCHEDULES = ("released", "paper", "step")
EMA_SCHEDULES = ("linear", "cosine")
CUDA_GRAPH = ("auto", "on", "off")
ON_NONFINITE = ("halt", "skip", "rollback")
BACKENDS = ("auto", "flash", "cudnn", "efficient", "math")


@dataclass(frozen=True)
class RecipeFields:
    """Part of `Recipe`: all but what only recipes with several views of an image have (`view_fields`)."""

    recipe: str = option("debug", "name of the recipe that the other flags start from")
    # model
    model: str = option(
        "hpm_vit_base_patch16_224",
        "registered model name: hpm_…, mae_… (no loss predictor), simmim_… or beit_…",
        origin=f"{PAPER}, ViT-B/16",
    )
    input_size: str = option("224", "side of the training crop, or HEIGHTxWIDTH", origin=PAPER)
    patch_size: int = option(16, "side of a patch", above=0, origin=PAPER)
    channels: int = option(
        3,
        "image channels of the model; photographs are converted, 1 to 3 and back",
        low=1,
        high=MAX_CHANNELS,
        origin=PAPER,
    )
    num_frames: int = option(1, "frames of a clip; 1 = images", above=0)
    sampling_rate: int = option(
        1, "a clip takes every how many-th frame of its video (VideoMAE: SSv2 2, Kinetics 4)", above=0
    )
    tubelet_size: int = option(1, "frames that a patch spans (VideoMAE: 2)", above=0)
    decoder_dim: int = option(512, "width of the reconstructor and of the loss predictor", above=0, origin=RELEASED)
    decoder_depth: int = option(
        8,
        "blocks of the reconstructor (SimMIM's is a linear head) and of the loss predictor",
        above=0,
        origin=f"{PAPER}, which ablates 1 to 12",
    )
    predictor_dim: int = option(0, "width of the loss predictor alone; 0 = decoder_dim", low=0)
    predictor_depth: int = option(0, "blocks of the loss predictor alone; 0 = decoder_depth", low=0)
    predictor: str = option(
        "separate",
        "loss predictor: blocks of its own, or shared: a small head on the reconstructor's (fast mode)",
        choices=PREDICTORS,
    )
    decoder_attention: str = option(
        "self",
        "decoders: self attention over all tokens, or cross: only masked ones, attending to visible (fast mode)",
        choices=DECODER_ATTENTIONS,
    )
    positions: str = option(
        "sincos",
        "of the encoder's tokens: fixed sine-cosine, learned, or (mask tokens in the encoder) relative: one table of "
        "biases for all blocks, without the fastest attention kernels",
        choices=POSITIONS,
        origin=f"{RELEASED}, MAE's and HPM's; BEiT has learned or relative ones",
    )
    drop_path: float = option(
        0.0, "share of samples whose branch the student's last block leaves out, from 0 in the first", low=0, below=1
    )
    layer_scale: float = option(0.0, "the blocks' branches begin scaled by this, learnt per channel; 0 = off", low=0)
    decoder_heads: int = option(16, "attention heads of both decoders", above=0, origin=RELEASED)
    # method
    mask_ratio: float = option(0.75, "share of patches that are masked", origin=PAPER)
    mask_policy: str = option("hpm", "which patches are masked", choices=POLICIES, origin=f"{PAPER}, Alg. 1")
    mask_unit: int = option(
        0, "side in pixels of the squares that are masked as a whole (SimMIM: 32); 0 = patch_size", low=0
    )
    throw_ratio: float = option(
        0.0, "attention masks (AMT): share of patches that neither encoder nor loss sees", low=0, high=1
    )
    warmup_mask_ratio: float = option(
        0.75, "attention masks: ratio of the random masks before the first maps", low=0, high=1
    )
    map_refresh_epochs: int = option(
        40, "attention masks and teacher_maps: epochs after which the maps are renewed", above=0
    )
    map_crop: str = option(
        "image",
        "attention masks: the map is cropped with its image, or its top left cells read, as released code does",
        choices=MAP_CROPS,
    )
    map_per_head: bool = option(False, "attention masks: scale each head's map and then average, as released code does")
    alpha_start: float = option(
        0.0, "share of the mask that the teacher chooses, at the start", low=0, high=1, origin=f"{PAPER}, Eq. 8"
    )
    alpha_end: float = option(
        0.5,
        "the same at the end; linear in between (Eq. 8)",
        low=0,
        high=1,
        origin=f"{PAPER}, Eq. 8; the released code counts (epoch+1)/T",
    )
    alpha_schedule: str = option(
        "released",
        "how far between them: (epoch+1)/epochs as in the released code, epoch/epochs as in the paper, or per step",
        choices=ALPHA_SCHEDULES,
        origin=f"{RELEASED}, the paper counts epoch/T",
    )
    predict_loss: str = option(
        "relative", "objective of the loss predictor (Eq. 4-7)", choices=PREDICT_LOSSES, origin=f"{PAPER}, Eq. 5-7"
    )
    difficulty: str = option(
        "paper",
        "how the teacher is asked what is hard (cross decoders know masked_query only)",
        choices=DIFFICULTIES,
        origin=PAPER,
    )
    absolute_standardize: bool = option(
        True,
        "absolute objective: of losses standardised per image (released code), not raw ones (Eq. 4)",
        origin=f"{RELEASED}, Eq. 4 has raw losses",
    )
    target: str = option(
        "pixels",
        "what masked patches are compared with: their pixels, features by the EMA teacher, DINO or CLIP, or tokens",
        choices=TARGETS,
        origin=f"{PAPER}, which ablates features of the EMA teacher, DINO and CLIP",
    )
    target_weights: str = option(
        "",
        "weights of the dino or clip teacher: a file, timm:NAME, transformers:NAME or open_clip:NAME/TAG; empty = "
        "timm's of the published ViT-B/16; of tokens their tokenizer: kmeans:FILE, dvae:FOLDER or vqkd:FILE",
    )
    target_model: str = option(
        "", "timm architecture of these weights; empty = the published ViT-B/16, or timm:NAME's (kmeans, dvae: none)"
    )
    target_dim: int = option(
        0, "width of their features, or number of tokens; 0 = 768 for dino, 512 for clip, 8192 tokens", low=0
    )
    pixel_loss: str = option(
        "mse", "reconstruction loss: mse (MAE, HPM) or l1 (SimMIM)", choices=PIXEL_LOSSES, origin=PAPER
    )
    norm_pix_loss: bool = option(
        False,
        "normalise each target patch to zero mean and unit variance",
        origin=f"{RELEASED}, its scripts; MAE's have --norm_pix_loss",
    )
    norm_pix_channels: bool = option(False, "norm_pix_loss of each channel by itself, as it always is of videos")
    ema_momentum: float = option(
        0.999,
        "teacher momentum at the start (Eq. 1)",
        low=0,
        high=1,
        origin=f"{RELEASED}, a ramp; the papers name one momentum: --ema_ramp_epochs 0 with both momenta alike",
    )
    ema_momentum_end: float = option(0.9999, "teacher momentum after the ramp", low=0, high=1, origin=RELEASED)
    ema_schedule: str = option(
        "linear", "how it gets there: linear over ema_ramp_epochs, or a cosine over all updates", choices=EMA_SCHEDULES
    )
    ema_ramp_epochs: int = option(
        100,
        "epochs over which the momentum ramps up linearly",
        low=0,
        origin=f"{RELEASED}, not scaled to the run's length",
    )
    teacher_scale: int = option(
        1, "the teacher sees images this many times smaller, its map is enlarged; 1 = full size (fast mode)", above=0
    )
    teacher_maps: bool = option(
        False, "masks follow the teacher's maps of whole images, made every map_refresh_epochs (fast mode)"
    )
    # optimisation
    batch_size: int = option(64, "samples per device and micro-step", above=0, run_only=True)
    accum_iter: int = option(
        0, "micro-steps per update; 0 = global_batch_size / (batch_size x devices), or 1", low=0, run_only=True
    )
    global_batch_size: int = option(
        0,
        "samples per update over all devices; 0 = batch_size x devices x accum_iter",
        low=0,
        origin=f"{OURS}, PRETRAIN.md: 2048, the released scripts: 256",
    )
    epochs: int = option(200, "epochs of the whole schedule", above=0, origin=f"{PAPER}, of the ablations")
    warmup_epochs: float = option(40.0, "epochs of linear learning-rate warm-up", low=0, origin=RELEASED)
    blr: float = option(1.5e-4, "base learning rate: lr = blr x global batch / 256", low=0, origin=RELEASED)
    lr: float = option(0.0, "absolute learning rate; 0 = from blr", low=0, origin=f"{RELEASED}, blr x batch / 256")
    min_lr: float = option(0.0, "learning rate at the end of the cosine", low=0, origin=RELEASED)
    weight_decay: float = option(
        0.05,
        "AdamW weight decay (none on biases, norms and tokens)",
        low=0,
        origin=f"{RELEASED}, which decays cls and mask token too",
    )
    weight_decay_end: float = option(-1.0, "the same at the end of a cosine; below 0 = constant", low=-1)
    beta1: float = option(0.9, "AdamW beta1", low=0, high=1, origin=RELEASED)
    beta2: float = option(0.95, "AdamW beta2", low=0, high=1, origin=RELEASED)
    clip_grad: float = option(
        5.0, "clip the gradient norm to this; 0 = off", low=0, origin=f"{RELEASED}, not in the papers: --clip_grad 0"
    )
    clip_per_tensor: bool = option(False, "clip_grad is of each parameter's gradient by itself (DINO, iBOT)")
    freeze_last_layer_epochs: int = option(0, "epochs in which the head's last layer stays as it is", low=0)
    init_from: str = option("", "start from the weights of this run, checkpoint or import; empty = from the seed")
    init_channels: str = option(
        "", "init_from of other channels: repeat, or which get red, green and blue, by name or number from 1: 4,3,2"
    )
    seed: int = option(0, "seed of the weights, the sample order, the crops and the masks", low=0)
    # data
    data_path: str = option("", "prepared set (.beton), several joined by commas, image folder, or synthetic:N")
    crop_min: float = option(
        0.2, "smallest share of the image area that a random crop covers", low=0, high=1, origin=RELEASED
    )
    flip: bool = option(True, "flip training images at random", origin=RELEASED)
    flip_vertical: bool = option(False, "put training images upside down at random: tiles, which have no up")
    rotate90: bool = option(False, "turn training images by a random multiple of 90 degrees; square crops only")
    interpolation: str = option(
        "bicubic", "how crops are resized; area is a little faster and softer", choices=INTERPOLATIONS
    )
    color_jitter: float = option(
        0.0, "brightness, contrast and saturation vary by up to this share; 0 = off", low=0, high=1
    )
    channel_dropout: float = option(
        0.0, "chance of each channel of a training image to become its mean; not of photographs", low=0, below=1
    )
    channel_jitter: float = option(
        0.0, "a channel's distance from its mean varies by up to this share; not of photographs", low=0, high=1
    )
    sample_order: str = option(
        "random",
        "order of an epoch; blocks: for sets larger than memory, neighbours on disk are read together and shuffled "
        "within pools of 1 GiB",
        choices=SAMPLE_ORDERS,
    )
    video_decoder: str = option(
        "auto",
        "who decodes prepared videos: turbojpeg (auto); dali on the CPU; dali_gpu; dali_video, NVDEC on a set prepared "
        "with --copy",
        choices=DECODERS,
    )
    steps_per_epoch: int = option(0, "updates per epoch; 0 = all full global batches of the data set", low=0)
    # the run itself: none of these changes what is learnt
    activation_checkpointing: bool = option(
        False, "save memory: keep the blocks' inputs only, compute the rest again in the backward pass", run_only=True
    )
    num_workers: int = option(
        0, "decoding threads per device; 0 = cores / devices on this machine", low=0, run_only=True
    )
    max_bad_samples: float = option(
        0.001,
        "share of the samples that may turn out not to decode (others take their places) before the run stops; 10 are "
        "always accepted, 0 = none",
        low=0,
        high=1,
        run_only=True,
    )
    output_dir: str = option("", "folder for checkpoints, logs, pictures and the report", run_only=True)
    deepspeed_config: str = option(
        "zero1_bf16", "DeepSpeed JSON, how to run: a preset of ds_configs/ by name, or a file", run_only=True
    )
    resume: str = option("auto", "auto = newest valid checkpoint in output_dir, none, or a checkpoint", run_only=True)
    log_every: int = option(20, "updates between two readings of the metrics", above=0, run_only=True)
    save_every: int = option(10, "epochs between two checkpoints", above=0, run_only=True)
    keep_checkpoints: int = option(3, "checkpoints kept; the newest valid one is never deleted", above=0, run_only=True)
    keep_every: int = option(0, "epochs between two checkpoints that are kept for ever; 0 = none", low=0, run_only=True)
    on_nonfinite: str = option(
        "halt",
        "what an update does whose loss or gradient is not finite: end the run, be left out, or go back to the last "
        "checkpoint and leave its samples out",
        choices=ON_NONFINITE,
        run_only=True,
    )
    max_nonfinite: int = option(10, "updates that on_nonfinite may leave out before the run ends", low=0, run_only=True)
    panel_every: int = option(10, "epochs between two picture panels; 0 = off", low=0, run_only=True)
    show: str = option(
        "",
        "channels that panels show, counted from 1 or by the names of bands: 3,2,1; a picture for every group of "
        "3,2,1/8,4,3; empty = grey, or red, green and blue",
        run_only=True,
    )
    rankme_every: int = option(
        100,
        "updates between two measurements of rankme, how many directions the features use; 0 = never",
        low=0,
        run_only=True,
    )
    difficulty_every: int = option(
        500,
        "updates between two measurements of difficulty_spearman, the agreement of the difficulty with the mean loss "
        "over random masks; 0 = never",
        low=0,
        run_only=True,
    )
    val_path: str = option(
        "", "held-out set on which that is measured; empty = images of data_path, seen whole", run_only=True
    )
    compile: bool = option(
        False, "compile the step with torch.compile: minutes at the start, then faster on GPUs", run_only=True
    )
    cuda_graph: str = option(
        "auto",
        "run updates as one CUDA graph, which takes the host next to no time: auto = on GPUs where that can be, on "
        "(says why it can't be), or off",
        choices=CUDA_GRAPH,
        run_only=True,
    )
    attention_backend: str = option(
        "auto",
        "torch's attention kernel on GPUs; auto = for each shape the one that is the fastest at the start",
        choices=BACKENDS,
        run_only=True,
    )
    online_probe_every: int = option(
        0,
        "updates between two steps of a linear probe on the encoder's detached features; 0 = off",
        run_only=True,
        low=0,
    )
    online_knn_every: int = option(
        0, "epochs between two k-NN tests on a fixed part of the training set; 0 = off", low=0, run_only=True
    )
    dense_path: str = option(
        "",
        "images with masks ({train,val}/{images,masks}/, or ADE20K's) for a k-NN test of patches; empty = off",
        run_only=True,
    )
    dense_every: int = option(10, "epochs between two such tests", above=0, run_only=True)
    stop_after: int = option(0, "stop after this many updates, keeping the schedule; 0 = never", low=0, run_only=True)
