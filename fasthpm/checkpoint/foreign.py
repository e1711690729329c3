"""Other people's checkpoints: read without running their code, found inside the file, measured, loaded all or nothing.

Published key names: MAE's (`patch_embed.proj.*`, `blocks.i.*`, `norm.*`, `decoder_embed.*`, `mask_token`,
`decoder_blocks.i.*`, `decoder_norm.*`, `decoder_pred.*`), which AMT keeps, and HPM's, which adds `*_losspred.*`.
VideoMAE's (`encoder.*`, `decoder.*`, `encoder_to_decoder.weight`), BEiT's (`attn.q_bias`, `lm_head.*`) and iBOT's
(`backbone.*`, `head.*`) are translated: `our_names`.
"""

import argparse
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasthpm.difficulty import HEAD
from fasthpm.errors import UserError, nearest
from fasthpm.model import LOSS_HEAD, HPMViT

SOURCES = ("hpm", "mae", "amt", "videomae", "beit", "ibot")
WITHOUT_PREDICTOR = ("mae", "amt", "videomae", "beit", "ibot")
WITHOUT_KEY_BIASES = ("videomae", "beit")
# Where trainers keep a state dict, the likeliest first.
STUDENT_KEYS = ("state_dict", "model", "module", "model_state_dict", "student", "net")
TEACHER_KEYS = ("ema_state_dict", "model_ema", "state_dict_ema", "ema", "teacher")
WRAPPERS = ("module.", "_orig_mod.", "student.", "model.", "backbone.")
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel: how often, no weight, and beside all prefixes
ANCHOR = "patch_embed.proj.weight"  # in every state dict of a ViT, whatever is wrapped around it
ENCODER_PREFIXES = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
HEAD_PREFIXES = ("head.", "head_dist.", "fc_norm.")
EMBEDDED_RECIPE = "fasthpm_recipe"  # metadata of our own safetensors files
IMPORT_NOTE = "import.json"  # where an imported checkpoint says what it was made of
POSITIONS = ("pos_embed", "decoder_pos_embed")
VIDEO_NAMES = (  # VideoMAE's beginnings of names and ours
    ("encoder_to_decoder.", "decoder_embed."),
    ("encoder.", ""),
    ("decoder.blocks.", "decoder_blocks."),
    ("decoder.norm.", "decoder_norm."),
    ("decoder.head.", "decoder_pred."),
)
BEIT_HEAD, BEIT_TABLE = "lm_head.weight", "rel_pos_bias.relative_position_bias_table"
BEIT_INDEX = "rel_pos_bias.relative_position_index"  # computed from the grid
IBOT_HEAD, IBOT_MASK = "head.last_layer.weight_v", "backbone.masked_embed"
PROTOTYPES, PATCHES_OWN = "decoder_pred.last_layer.", "decoder_pred.last_layer2."  # iBOT's last layers by our names
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LISTED = 6  # names that an error message spells out


# -------------------------------------------------------------------------------------------------- the weights in it
def find_weights(content: Mapping[str, Any], which: str, ignore: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """State dict of the "student" or the "teacher" (EMA) in a checkpoint, without wrappers' prefixes; {} if none.

    - `ignore`: beginnings of names that are left out, as they stand in the file; only then wrappers are looked for

    **Raises:** `UserError` for a tensor that claims more values than the file holds.
    """
    if _is_state(content):
        found: Mapping[str, Any] | None = content if which == "student" else None
    else:
        found = _search(content, STUDENT_KEYS if which == "student" else TEACHER_KEYS)
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if found else {}
    tensors = {k: v for k, v in tensors.items() if not (k.startswith(ignore) if ignore else False) and k != COUNTER}
    swollen = [k for k, v in tensors.items() if v.numel() * v.element_size() > v.untyped_storage().nbytes()]
    if swollen:  # a stride of 0 makes a terabyte of one number
        raise UserError(
            f"{swollen[0]} claims shape {tuple(tensors[swollen[0]].shape)}, and the file holds less than that"
        )
    return strip_wrappers(tensors)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(key, str) and key.endswith(ANCHOR) for key in value)


def _search(content: Mapping[str, Any], names: Iterable[str], depth: int = 3) -> Mapping[str, Any] | None:
    """The first state dict under one of `names`, or further down under the usual ones."""
    nested = [value for name in names if isinstance(value := content.get(name), Mapping)]
    for value in nested:
        found = value if _is_state(value) else _search(value, STUDENT_KEYS, depth - 1) if depth else None
        if found is not None:
            return found
    return None


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that wrappers (DDP, torch.compile, a step module) put before all of them."""
    names = dict(state)
    while prefix := next((w for w in WRAPPERS if names and all(key.startswith(w) for key in names)), ""):
        names = {key.removeprefix(prefix): value for key, value in names.items()}
    return names


def stored_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """The training arguments that a checkpoint carries along, {} if none."""
    arguments = content.get("args", {})
    if isinstance(arguments, argparse.Namespace | types.SimpleNamespace):
        return dict(vars(arguments))
    return dict(arguments) if isinstance(arguments, Mapping) else {}


@dataclass(frozen=True)
class Layout:
    """Other people's names of a vision transformer, that are not among `SOURCES`."""

    names: str  # whose
    mark: str  # a regular expression of a name that others don't have
    remedy: str = (
        "these names can't be imported; give the checkpoint of the original code, or make features of it with its "
        "own library"
    )


LAYOUTS = (
    Layout("Hugging Face transformers", r"embeddings\.patch_embeddings\.projection\.weight$"),
    Layout("torchvision", r"(^|\.)conv_proj\.weight$"),
    Layout("OpenAI's CLIP or open_clip", r"(^|\.)(visual\.conv1\.weight|visual\.class_embedding)$"),
    Layout("a Swin transformer", r"(^|\.)layers\.\d+\.blocks\.\d+\."),
    Layout("BEiT", r"relative_position_(bias|index)"),
    Layout("a ViT with LayerScale, as DINOv2 and BEiT have", r"(^|\.)blocks\.\d+\.(ls1\.gamma|gamma_1)$"),
    Layout("a residual network, no transformer", r"(^|\.)layer1\.0\.conv1\.weight$"),
)


def foreign_layout(names: Iterable[str]) -> str:
    """ "is of …, and what to do", for names of tensors that are recognised as somebody else's; empty for others."""
    names = list(names)
    for layout in LAYOUTS:
        if any(re.search(layout.mark, name) for name in names):
            return f"has the names of {layout.names}: {layout.remedy}"
    return ""


def all_names(content: Mapping[Any, Any], depth: int = 3) -> Iterator[str]:
    """Names of the tensors in a checkpoint, at whatever depth they lie."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield str(key)
        elif isinstance(value, Mapping) and depth:
            yield from all_names(value, depth - 1)


def unusable(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of tensors that are no weights to compute with, under what is wrong with them."""
    kinds = {key: str(value.dtype).removeprefix("torch.") for key, value in state.items()}
    quantised = [key for key, value in state.items() if value.is_quantized or value.dtype not in FLOATS]
    finite = [key for key in state if key not in quantised and not bool(torch.isfinite(state[key]).all())]
    return {"quantised, no plain weights": [f"{key} ({kinds[key]})" for key in quantised], "not finite": finite}


# -------------------------------------------------------------------------------------------------- its sizes
@dataclass(frozen=True)
class Architecture:
    """What the shapes of a state dict tell; heads leave no trace in them."""

    embed_dim: int
    depth: int
    patch_size: int
    in_chans: int
    num_patches: int  # 0 = not told: a video model's positions need not be in the file
    decoder_dim: int  # 0 = no decoder
    decoder_depth: int
    predictor_depth: int  # 0 = no loss predictor
    tubelet_size: int = 0  # frames of a patch of a video model; 0 = image model
    tokens: int = 0  # that BEiT's head predicts; 0 = no such head
    relative: bool = False  # BEiT's relative positions
    layer_scale: float = 0.0  # mean of the first block's weights; 0 = there are none
    prototypes: int = 0  # of iBOT's projection head; 0 = no such head
    head_hidden: int = 0  # width of its layers
    free_norm: bool = False  # whether the prototypes have lengths other than 1


def detect_source(state: Mapping[str, Tensor]) -> str:
    """Whose key names these are: "ibot", "beit", "videomae", "hpm" or "mae" (AMT's are MAE's)."""
    if IBOT_HEAD in state or IBOT_MASK in state:
        return "ibot"
    biases = any(key.endswith("attn.q_bias") for key in state)
    if BEIT_HEAD in state or BEIT_TABLE in state or (biases and ANCHOR in state and state[ANCHOR].dim() == 4):
        return "beit"
    if any(key.endswith("attn.q_bias") for key in state) or any(key.startswith("encoder.") for key in state):
        return "videomae"
    return "hpm" if any("_losspred" in key for key in state) else "mae"


def check_source(source: str) -> None:
    """**Raises:** `UserError` for an unknown source."""
    if source not in SOURCES:
        raise UserError(f"source is {source!r}, expected one of {', '.join(SOURCES)}{nearest(source, SOURCES)}")


def _check_video(kernel: Tensor, source: str) -> None:
    """**Raises:** `UserError` for an image model under VideoMAE's names."""
    if source == "videomae" and kernel.dim() != 5:
        raise UserError(
            f"source videomae: these are an image model's weights, {ANCHOR} is {tuple(kernel.shape)} (SimMIM's keys "
            f"begin with encoder. too; they can't be imported); give a VideoMAE, HPM, MAE or AMT checkpoint"
        )


def our_names(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """VideoMAE's and BEiT's tensors under our names, the key biases that they lack set to zero; iBOT's under our names;
    others' as they are."""
    if source == "ibot":
        return _ibot_names(state)
    if source not in WITHOUT_KEY_BIASES:
        return dict(state)
    if source == "videomae":
        names = {video_name(key): value for key, value in state.items()}
    else:
        kept = {key: value for key, value in state.items() if key != BEIT_INDEX}
        names = {re.sub(r"^lm_head\.", "decoder_pred.", key): value for key, value in kept.items()}
    for key in [key for key in names if key.endswith("attn.q_bias")]:
        query, stem = names.pop(key), key.removesuffix("q_bias")
        if (value := names.pop(f"{stem}v_bias", None)) is not None:
            names[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return names


def _ibot_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """iBOT's tensors under our names. Its head lists a layer that cls and patches share twice, as `last_layer2` too:
    that is left out, and so are lengths of prototypes that are all 1, as they stay unless they are learnt."""
    names = {key.removeprefix("backbone."): value for key, value in state.items() if key != IBOT_MASK}
    names = {re.sub(r"^head\.", "decoder_pred.", key): value for key, value in names.items()}
    for key in [key for key in names if key.startswith(PATCHES_OWN)]:
        shared = names.get(key.replace(PATCHES_OWN, PROTOTYPES))
        if shared is not None and torch.equal(shared, names[key]):
            del names[key]
    if (lengths := names.get(f"{PROTOTYPES}weight_g")) is not None and bool((lengths == 1).all()):
        del names[f"{PROTOTYPES}weight_g"]
    if IBOT_MASK in state:
        names["mask_token"] = state[IBOT_MASK].reshape(1, 1, -1)
    return names


def video_name(key: str) -> str:
    """Our name of one of VideoMAE's tensors."""
    for theirs, ours in VIDEO_NAMES:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def ibot_centres(content: Mapping[str, Any]) -> Tensor | None:
    """The centres of iBOT's loss, of cls and of patches: float32 [2, K]; None where a file has none of one length."""
    kept = content.get("ibot_loss", {})
    found = [kept.get(name) for name in ("center", "center2")] if isinstance(kept, Mapping) else []
    rows = [one.float().flatten() for one in found if isinstance(one, Tensor) and one.dtype in FLOATS]
    return torch.stack(rows) if len(rows) == 2 and len(rows[0]) == len(rows[1]) else None


def infer_architecture(state: Mapping[str, Tensor], source: str = "") -> Architecture:
    """Sizes of the model that a state dict, under our names, belongs to.

    **Raises:** `UserError` if the parts that tell them are missing, or if DeepSpeed ZeRO-3 has partitioned them away.
    """
    if ANCHOR in state:
        _check_video(state[ANCHOR], source)
    video = ANCHOR in state and state[ANCHOR].dim() == 5
    table = state.get(BEIT_TABLE)
    positions_tell = () if video or table is not None else ("pos_embed",)
    telling = (ANCHOR, "blocks.0.mlp.fc1.weight", *positions_tell, *(() if video else ("cls_token",)))
    missing = [key for key in telling if key not in state]
    if missing:
        raise UserError(_why_missing(state, missing))
    if any(state[key].numel() == 0 for key in telling):
        raise UserError("the weights are empty: ZeRO-3 kept them elsewhere; run DeepSpeed's zero_to_fp32.py first")
    kernel = state[ANCHOR]
    positions = state.get("pos_embed", kernel.new_zeros(1, 0, 0))
    if kernel.dim() not in (4, 5) or kernel.shape[-2] != kernel.shape[-1] or positions.dim() != 3:
        raise UserError(
            f"{ANCHOR} is {tuple(kernel.shape)} and pos_embed {tuple(positions.shape)}, expected (width, channels, P, "
            f"P) and (1, 1 + patches, width), an image model, or (width, channels, frames, P, P), a video model"
        )
    decoder = state.get("decoder_embed.weight")
    return Architecture(
        embed_dim=kernel.shape[0],
        depth=_depth(state, "blocks"),
        patch_size=kernel.shape[-1],
        in_chans=kernel.shape[1],
        num_patches=_patches_of(table) if table is not None else positions.shape[1] - (0 if video else 1),
        decoder_dim=0 if decoder is None else decoder.shape[0],
        decoder_depth=_depth(state, "decoder_blocks"),
        predictor_depth=_depth(state, "decoder_blocks_losspred"),
        tubelet_size=kernel.shape[2] if video else 0,
        tokens=len(state["decoder_pred.weight"]) if source == "beit" and "decoder_pred.weight" in state else 0,
        relative=table is not None,
        layer_scale=float(state["blocks.0.gamma_1"].float().mean()) if "blocks.0.gamma_1" in state else 0.0,
        prototypes=len(state.get(f"{PROTOTYPES}weight_v", ())),
        head_hidden=len(state.get("decoder_pred.mlp.0.weight", ())),
        free_norm=f"{PROTOTYPES}weight_g" in state,
    )


def _patches_of(table: Tensor) -> int:
    """Patches of a square grid, by the rows of its table of relative positions: (2 side - 1)^2 and three of cls."""
    side = (math.isqrt(len(table) - 3) + 1) // 2 if len(table) > 3 else 0
    if table.dim() != 2 or (2 * side - 1) ** 2 + 3 != len(table):
        raise UserError(f"{BEIT_TABLE} is {tuple(table.shape)}, expected (2 side - 1)^2 + 3 rows of a square grid")
    return side**2


def _why_missing(state: Mapping[str, Tensor], missing: list[str]) -> str:
    """What is wrong with a state dict that lacks `missing`, as far as its names tell."""
    wrapped = next((key for key in state if key.endswith(f".{ANCHOR}")), "")
    if ANCHOR in missing and wrapped:
        prefix = wrapped.removesuffix(ANCHOR)
        others = [key for key in state if not key.startswith(prefix)]
        if others:
            return (
                f"the weights lie under {prefix!r}, but for {_listed(others)}: leave these out with --ignore, if they "
                f"are no part of the model"
            )
        return f"the weights lie under {prefix!r}, which no known trainer puts there; save them without it"
    if layout := foreign_layout(state):
        return layout
    return f"the weights have no {_listed(missing)}, which every HPM, MAE and AMT checkpoint has"


def _depth(state: Mapping[str, Tensor], name: str) -> int:
    """Number of blocks called `name`.0, `name`.1, …"""
    return 1 + max((int(m[1]) for key in state if (m := re.match(rf"{name}\.(\d+)\.", key))), default=-1)


# -------------------------------------------------------------------------------------------------- into a model
@dataclass
class KeyReport:
    """What became of every key; reasons map to the keys that they explain."""

    matched: list[str] = field(default_factory=list)  # taken as they are
    converted: dict[str, list[str]] = field(default_factory=dict)  # taken, and how they were changed
    ignored: dict[str, list[str]] = field(default_factory=dict)  # left in the file, and why
    fresh: list[str] = field(default_factory=list)  # of the model, not in the file, left at their initial values

    def lines(self) -> list[str]:
        """The report as text, one line for each kind and reason."""
        rows = [f"matched    {len(self.matched)} tensors"]
        for name, groups in (("converted", self.converted), ("ignored", self.ignored)):
            rows += [f"{name:10} {len(keys)}, {reason}: {_listed(keys)}" for reason, keys in groups.items()]
        if self.fresh:
            rows.append(f"fresh      {len(self.fresh)} not in the file, freshly initialised: {_listed(self.fresh)}")
        return rows


def load_reference(
    model: HPMViT,
    state_dict: Mapping[str, Tensor],
    source: str,
    *,
    encoder_only: bool = False,
    ignore: Iterable[str] = (),
) -> KeyReport:
    """Load weights of a published implementation into `model`, all or nothing.

    - `source`: "hpm" (its P*P*C-wide loss head becomes the average of its rows, the same function), "mae" or "amt" (a
      model with a loss predictor keeps its own for the keys that they lack), "videomae" (the same; the biases of the
      keys, which it lacks, become zeros, and positions are computed), "beit" (the same, but positions are its own;
      its head of tokens is the reconstructor) or "ibot" (its projection head is the reconstructor). A difficulty head
      (difficulty in_place) is taken where both have one, and stays as it is where the weights have none
    - `encoder_only`: leave out decoders and a classifier's head
    - `ignore`: prefixes of further keys to leave out

    **Returns:** what became of every key.
    **Raises:** `UserError` that lists missing and unexpected keys, wrong shapes and values that are not finite.
    """
    check_source(source)
    report = KeyReport()
    own = model.state_dict()
    given = _translated(our_names(strip_wrappers(state_dict), source), report, encoder_only, tuple(ignore))
    for key in [key for key in given if key.startswith(f"{HEAD}.") and key not in own]:
        report.ignored.setdefault("a difficulty head, which the model lacks", []).append(key)
        del given[key]
    if source == "videomae":
        if not model.video:
            raise UserError("source videomae: the model takes images; create a video model (videomae_…, hpm_…_video)")
        if ANCHOR in given:
            _check_video(given[ANCHOR], source)
        computed = [key for key in POSITIONS if key in own and key not in given]
        given |= {key: own[key] for key in computed}
        report.converted["computed: fixed, and not in the file"] = computed
    if source in WITHOUT_KEY_BIASES:
        zeros = [key for key in given if key.endswith("attn.qkv.bias")]
        report.converted["with zeros for the biases of the keys, which softmax ignores"] = zeros
    absent = [key for key in own if key not in given]
    report.fresh = [key for key in absent if _may_lack(key, source, encoder_only)]
    problems = {
        "missing": [key for key in absent if key not in report.fresh],
        "unexpected": [key for key in given if key not in own],
        "wrong shape": [_shapes(k, given[k], own[k]) for k in given if k in own and given[k].shape != own[k].shape],
        **unusable(given),
    }
    if any(problems.values()):
        found = "; ".join(f"{name} {_listed(keys, quoted=True)}" for name, keys in problems.items() if keys)
        layout = foreign_layout(problems["unexpected"])
        raise UserError(
            f"{source} weights do not fit the model: {found}{f'; it {layout}' if layout else _remedy(problems)}"
        )
    _note_dtypes(given, own, report)
    model.load_state_dict({**own, **given})
    return report


def _translated(
    state: dict[str, Tensor], report: KeyReport, encoder_only: bool, ignore: tuple[str, ...]
) -> dict[str, Tensor]:
    """The tensors that are to be loaded, under our names and in our form; the others are noted in `report`."""
    given = dict(state)
    if encoder_only and "norm.weight" not in given and "fc_norm.weight" in given:
        for name in ("weight", "bias"):
            given[f"norm.{name}"] = given.pop(f"fc_norm.{name}")
        note = "from fc_norm, which normalised the averaged patches: the nearest thing, not the same function"
        report.converted[note] = ["norm.weight", "norm.bias"]
    for key in list(given):
        if reason := _ignorable(key, encoder_only, ignore):
            report.ignored.setdefault(reason, []).append(key)
            del given[key]
    for key in (f"{LOSS_HEAD}.weight", f"{LOSS_HEAD}.bias"):
        if key in given and (rows := len(given[key])) > 1:
            given[key] = _wide(given[key]).mean(dim=0, keepdim=True).to(given[key].dtype)
            report.converted.setdefault(f"the average of {rows} rows, the same function", []).append(key)
    return given


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, so that an average of half-precision rows is not rounded on the way."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _ignorable(key: str, encoder_only: bool, ignore: tuple[str, ...]) -> str:
    """Why a key is left out, or an empty string."""
    if key == "vis_mask_token":
        return "HPM's masks on visible patches, which no recipe uses"
    if ignore and key.startswith(ignore):
        return "as asked"
    if encoder_only and key.startswith(HEAD_PREFIXES):
        return "a classifier's head"
    if encoder_only and (key == "mask_token" or key.startswith(("decoder_", f"{HEAD}."))):
        return "not part of the encoder"
    return ""


def _may_lack(key: str, source: str, encoder_only: bool) -> bool:
    if encoder_only:
        return not key.startswith(ENCODER_PREFIXES)
    if key.startswith(f"{HEAD}."):
        return True
    return source in WITHOUT_PREDICTOR and "losspred" in key


def _note_dtypes(given: dict[str, Tensor], own: dict[str, Tensor], report: KeyReport) -> None:
    """Sort what is loaded into matched and converted."""
    done = {key for keys in report.converted.values() for key in keys}
    for key, value in given.items():
        if key in done:
            continue
        if value.dtype == own[key].dtype:
            report.matched.append(key)
        else:
            kinds = [str(dtype).removeprefix("torch.") for dtype in (value.dtype, own[key].dtype)]
            report.converted.setdefault(" to ".join(kinds), []).append(key)


def _remedy(problems: dict[str, list[str]]) -> str:
    if problems["not finite"]:
        return "; the file is of no use, take an earlier checkpoint"
    if any(keys for name, keys in problems.items() if name.startswith("quantised")):
        return "; give the weights as they were before quantisation"
    if problems["missing"] and not any(key.startswith(ENCODER_PREFIXES) for key in problems["missing"]):
        return "; create the model with the checkpoint's sizes, or load the encoder alone (encoder_only)"
    return "; create the model with the checkpoint's sizes"


def _shapes(key: str, given: Tensor, own: Tensor) -> str:
    return f"{key} {tuple(given.shape)} for {tuple(own.shape)}"


def _listed(names: list[str], quoted: bool = False) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (str(names[:LISTED]) if quoted else ", ".join(names[:LISTED])) + more
