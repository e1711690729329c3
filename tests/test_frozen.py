"""Frozen teachers compute what their own libraries compute; weights fit or are refused."""

import dataclasses
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fasthpm import frozen, recipes
from fasthpm.errors import UserError
from fasthpm.frozen import FrozenTeacher
from tests.helpers.features import FAMILIES, images, small
from tests.helpers.small_teachers import PROJECTED, SIZES, WIDTH

CPU = torch.device("cpu")
STATISTICS = {  # as published, channel by channel
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def normalised(pixels: Tensor, target: str) -> Tensor:
    """float32 [B, 3, H, W] as the target's teacher wants it, value by value."""
    mean, std = STATISTICS[target]
    planes = [(pixels[..., c].double() / 255 - mean[c]) / std[c] for c in range(3)]
    return torch.stack(planes, dim=1).float()


# -------------------------------------------------------------------------------------------------- teachers
class OpenAIBlock(nn.Module):
    """A residual block of OpenAI's CLIP, with its names."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(WIDTH, 2 * WIDTH), c_proj=nn.Linear(2 * WIDTH, WIDTH)))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp.get_submodule("c_fc")(self.ln_2(tokens))
        return tokens + self.mlp.get_submodule("c_proj")(hidden * torch.sigmoid(1.702 * hidden))


class OpenAIVisual(nn.Module):
    """The vision tower of OpenAI's CLIP, with its names; gives the projected patch tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(17, WIDTH))
        self.proj = nn.Parameter(torch.randn(WIDTH, PROJECTED))
        self.conv1 = nn.Conv2d(3, WIDTH, 4, 4, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.Sequential(OrderedDict(resblocks=nn.Sequential(OpenAIBlock(), OpenAIBlock())))
        for parameter in self.parameters():  # biases and norms too
            nn.init.normal_(parameter, std=0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        tokens = self.transformer(self.ln_pre(tokens + self.positional_embedding))
        return (self.ln_post(tokens) @ self.proj)[:, 1:]


def openai_state(visual: nn.Module) -> dict[str, Tensor]:
    """A whole CLIP's state dict around a vision tower."""
    text = {
        "positional_embedding": torch.ones(77, 8),
        "text_projection": torch.ones(8, 8),
        "transformer.resblocks.0.ln_1.weight": torch.ones(8),
        "token_embedding.weight": torch.ones(9, 8),
        "ln_final.weight": torch.ones(8),
        "logit_scale": torch.ones(()),
    }
    return text | {f"visual.{key}": value for key, value in visual.state_dict().items()}


@torch.no_grad()
def test_clip_in_openais_names_computes_what_openais_model_computes(tmp_path: Path) -> None:
    visual = OpenAIVisual().eval()
    torch.save(openai_state(visual), tmp_path / "clip.pt")
    recipe = small("clip", target_weights=str(tmp_path / "clip.pt"))
    teacher = frozen.build_frozen(recipe, CPU, torch.float32)
    assert teacher is not None
    torch.testing.assert_close(teacher(images()), visual(normalised(images(), "clip")), atol=1e-4, rtol=1e-4)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@torch.no_grad()
def test_open_clip_models_load_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip gives modules with OpenAI's names; of the library only its loader is replaced."""
    asked = []

    class QuickGELU(nn.Module):
        pass

    def create_model(name: str, pretrained: str) -> Any:
        asked.append((name, pretrained))
        return whole

    whole = nn.Module()
    whole.visual = OpenAIVisual().eval()
    monkeypatch.setitem(sys.modules, "open_clip", SimpleNamespace(create_model=create_model))
    recipe = small("clip", target_weights="open_clip:ViT-B-16/some_tag")
    with pytest.raises(UserError, match="trained with gelu, the target_model has quick_gelu"):
        frozen.build_frozen(recipe, CPU)
    whole.visual.act = QuickGELU()
    teacher = frozen.build_frozen(recipe, CPU, torch.float32)
    assert asked[-1] == ("ViT-B-16", "some_tag")
    assert teacher is not None
    torch.testing.assert_close(teacher(images()), whole.visual(normalised(images(), "clip")), atol=1e-4, rtol=1e-4)


def hidden_sizes() -> dict[str, Any]:
    """What transformers' configurations share."""
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": SIZES["depth"],
        "num_attention_heads": SIZES["num_heads"],
        "intermediate_size": 2 * WIDTH,
        "image_size": 16,
        "patch_size": 4,
    }


def randomised(model: Any) -> Any:
    """Norms, biases and positions are not ones and zeros any more."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def test_dino_by_transformers_computes_what_transformers_computes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs Hugging Face transformers")
    model = randomised(transformers.ViTModel(transformers.ViTConfig(**hidden_sizes(), layer_norm_eps=1e-6)))
    model.save_pretrained(tmp_path)
    theirs = model(normalised(images(), "dino")).last_hidden_state[:, 1:]
    for weights in (f"transformers:{tmp_path}", str(tmp_path / "model.safetensors")):
        teacher = frozen.build_frozen(small("dino", target_weights=weights), CPU, torch.float32)
        assert teacher is not None
        torch.testing.assert_close(teacher(images()), theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_clip_by_transformers_computes_what_transformers_computes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs Hugging Face transformers")
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"vision_config": hidden_sizes(), "text_config": text, "projection_dim": PROJECTED}
    model = randomised(transformers.CLIPModel(transformers.CLIPConfig(**config)))
    model.save_pretrained(tmp_path)
    tokens = model.vision_model(normalised(images(), "clip")).last_hidden_state
    theirs = model.visual_projection(model.vision_model.post_layernorm(tokens))[:, 1:]
    recipe = small("clip", target_weights=f"transformers:{tmp_path}")
    teacher = frozen.build_frozen(recipe, CPU, torch.float32)
    assert teacher is not None
    torch.testing.assert_close(teacher(images()), theirs, atol=1e-4, rtol=1e-4)
    exact = dataclasses.replace(recipe, target_model="fasthpm_small_dino")
    with pytest.raises(UserError, match="trained with quick_gelu, the target_model has gelu"):
        frozen.build_frozen(exact, CPU)


@torch.no_grad()
def test_grey_images_are_read_as_three_equal_channels() -> None:
    recipe = small("dino", channels=1)
    teacher = FrozenTeacher(frozen.create_vit(recipe, recipe.target_model, FAMILIES[recipe.target]), FAMILIES["dino"])
    grey = images(channels=1)
    assert torch.equal(teacher(grey), teacher(grey.expand(-1, -1, -1, 3)))


def test_features_are_those_of_each_patch() -> None:
    """Without attention between them, a patch's features depend on its own pixels: the two grids agree."""
    recipe = small("dino")
    teacher = FrozenTeacher(frozen.create_vit(recipe, recipe.target_model, FAMILIES[recipe.target]), FAMILIES["dino"])
    for block in teacher.vit.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    one, two = images(1), images(1)
    two[0, 4:8, 8:12] += 50  # row 1, column 2 of 4 x 4 patches
    changed = (teacher(one) - teacher(two)).abs().sum(dim=(0, 2)) > 1e-4
    assert changed.nonzero().flatten().tolist() == [6]


# -------------------------------------------------------------------------------------------------- full size
def test_a_full_size_dino_loads_from_its_own_kind_of_file(tmp_path: Path) -> None:
    """{"student", "teacher"} with backbones and projection heads, as DINO's training saves them."""
    vit = timm.create_model("vit_base_patch16_224", num_classes=0).half()
    backbone = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
    head = {"head.mlp.0.weight": torch.ones(4, 768), "head.last_layer.weight_v": torch.ones(4, 4)}
    torch.save({"teacher": backbone | head, "epoch": 1}, tmp_path / "dino.pth")
    recipe = dataclasses.replace(
        recipes.from_name("hpm_dino_vit_base_in1k_200e"), target_weights=str(tmp_path / "dino.pth")
    )
    teacher = frozen.build_frozen(recipe, CPU)
    assert teacher is not None
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(teacher.vit.blocks[11].mlp.fc2.weight, vit.blocks[11].mlp.fc2.weight.bfloat16())
    assert teacher(images(1, side=224)).shape == (1, 196, 768)


def test_a_full_size_clip_loads_in_openais_names(tmp_path: Path) -> None:
    names = [
        ("cls_token", "class_embedding"),
        ("pos_embed", "positional_embedding"),
        ("norm_pre", "ln_pre"),
        ("patch_embed.proj", "conv1"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        (".norm1", ".ln_1"),
        (".norm2", ".ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("blocks.", "transformer.resblocks."),
        ("head.weight", "proj"),
    ]
    vit: Any = timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=512).half()
    state = {}
    for key, value in vit.state_dict().items():
        theirs = "ln_post" + key.removeprefix("norm") if key.startswith("norm.") else key
        for ours, published in names:
            theirs = theirs.replace(ours, published)
        state[f"visual.{theirs}"] = value.squeeze() if "embedding" in theirs else value.T if theirs == "proj" else value
    del state["visual.head.bias"]
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "clip.safetensors")
    weights = str(tmp_path / "clip.safetensors")
    recipe = dataclasses.replace(recipes.from_name("hpm_clip_vit_base_in1k_200e"), target_weights=weights)
    teacher = frozen.build_frozen(recipe, CPU)
    assert teacher is not None
    torch.testing.assert_close(teacher.vit.head.weight, vit.head.weight.bfloat16())
    assert teacher(images(1, side=224)).shape == (1, 196, 512)
    wrong = dataclasses.replace(recipe, target="dino")
    with pytest.raises(UserError) as caught:
        frozen.build_frozen(wrong, CPU)
    assert "1 missing: patch_embed.proj.bias; 2 unexpected: norm_pre.bias, norm_pre.weight" in str(caught.value)


# -------------------------------------------------------------------------------------------------- refusals
def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    vit = frozen.create_vit(small("dino"), "fasthpm_small_dino", FAMILIES["dino"])
    state = vit.state_dict()
    state["blocks.2.norm1.weight"] = state.pop("blocks.1.norm1.weight")
    state["pos_embed"] = torch.zeros(1, 10, WIDTH)
    state["norm.bias"] = torch.full((WIDTH,), torch.nan)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(UserError) as caught:
        frozen.build_frozen(small("dino", target_weights=str(tmp_path / "wrong.pth")), CPU)
    text = str(caught.value)
    for part in (
        "wrong.pth: ",
        "1 missing: blocks.1.norm1.weight",
        "1 unexpected: blocks.2.norm1.weight",
        "1 wrong shape: pos_embed (1, 10, 32) for (1, 17, 32)",
        "1 not finite: norm.bias",
    ):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target_model": "vit_basis"}, "'vit_basis' is no timm model"),
        ({"target_model": "resnet18"}, "resnet18 is no plain vision transformer"),
        ({"target_model": "test_vit"}, "cuts an image of 16 into 1 x 1 patches of 16, the student into 4 x 4 of 4"),
        ({"target_dim": 0}, "gives 32 features per patch, and 768 are expected; use --target_dim 32"),
        ({"channels": 2}, "teacher of colour images, and channels is 2"),
        ({"target_weights": "nowhere.pth"}, "nowhere.pth cannot be read"),
        ({"target_weights": "timm:vit_base_patch16_224.dyno"}, "timm has no weights named vit_base_patch16_224.dyno"),
        ({"target_weights": "open_clip:ViT-B-16/tag"}, "open_clip is not installed; pip install open_clip_torch"),
        ({"target_weights": "transformers:tests"}, "tests has no config.json"),
    ],
)
def test_teachers_that_cannot_be_are_refused(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError) as caught:
        frozen.build_frozen(small("dino", **changes), CPU)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host\nmany lines")

    monkeypatch.setattr(frozen.timm, "create_model", offline)
    with pytest.raises(UserError, match=r"timm cannot download them \(no route to host\); give another"):
        frozen.load_vit_weights(None, FAMILIES["dino"].weights)


def test_timm_names_bring_their_architecture_and_openais_the_quick_gelu() -> None:
    clip = FAMILIES["clip"]
    assert frozen.default_architecture("timm:vit_large_patch14_clip_224.laion2b", clip) == "vit_large_patch14_clip_224"
    quick = "vit_base_patch16_clip_quickgelu_224"
    for name in ("vit_base_patch16_clip_224.openai", f"{quick}.openai"):
        assert frozen.default_architecture(f"timm:{name}", clip) == quick
    assert frozen.default_architecture("clip.pt", clip) == quick
