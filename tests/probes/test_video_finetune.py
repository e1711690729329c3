"""Fine-tuning, linear probe and multi-view tests of video runs, through the real loaders and the engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup, create_transform
from torch import Tensor, nn

from fasthpm.data import LoaderOptions, build_loader
from fasthpm.data.augmented import Augmentation, AugmentedLoader, _picture, _seed_all
from fasthpm.errors import UserError
from fasthpm.model import create_model
from fasthpm.probes import finetune, linear
from fasthpm.probes.classifier import build_classifier, load_classifier, resize_positions, resize_slots
from fasthpm.probes.finetune import settings as finetune_settings
from fasthpm.probes.finetune import training
from tests.helpers.finetuning import FLOAT32, read, refused, same_weights, start
from tests.helpers.reference import layer_normalised_pool, sinusoid
from tests.helpers.video_fixtures import prepare_videos, video_folder
from tests.helpers.videos import small, video_run


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten prepared videos of two classes and two shapes."""
    folder = tmp_path_factory.mktemp("videos")
    return prepare_videos(video_folder(folder / "files", 10), folder / "set")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video run's folder: 8 frames of 16 x 16 in slots of 2, patches of 8."""
    return video_run(tmp_path_factory.mktemp("run") / "run", flip=False)[0]


def words(videos: Path, *more: object) -> tuple[object, ...]:
    """Everything on: repeats, RandAugment, mixing, erasing, drop path."""
    return (
        "--train_path",
        videos,
        "--val_path",
        videos,
        "--epochs",
        "2",
        "--warmup_epochs",
        "0",
        "--batch_size",
        "4",
        "--global_batch_size",
        "8",
        "--num_sample",
        "2",
        "--lr",
        "0.02",
        "--mixup",
        "0.8",
        "--cutmix",
        "1",
        "--reprob",
        "0.25",
        "--drop_path",
        "0.1",
        "--aa",
        "rand-m7-n4-mstd0.5-inc1",
        "--num_workers",
        "1",
        "--log_every",
        "1",
        "--test_views",
        "2x3",
        *FLOAT32,
        *more,
    )


# -------------------------------------------------------------------------------------------------- the network
def test_the_classifier_is_the_encoder_with_a_norm_and_a_head() -> None:
    """Values and gradients against the encoder's own blocks; the embedding against a 3-D convolution."""
    model = small()
    with pytest.raises(Exception, match="video models have no cls token; use --global_pool avg"):
        build_classifier(model, 3, image_size=(4, 6), global_pool="token")
    vit = build_classifier(model, 3, image_size=(4, 6)).double()
    assert "pos_embed" not in dict(vit.named_parameters())
    vit.pos_embed = model.pos_embed
    vit.load_state_dict({k: v for k, v in model.state_dict().items() if k in vit.state_dict()}, strict=False)
    with torch.no_grad():
        for parameter in (*vit.head.parameters(), *vit.fc_norm.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    clips = torch.randn(3, 2, 4, 4, 6, dtype=torch.float64)
    kernel = model.patch_embed.proj
    tokens = nn.functional.conv3d(clips, kernel.weight, kernel.bias, stride=(2, 2, 2)).flatten(2).mT
    torch.testing.assert_close(vit.patch_embed(clips), tokens, rtol=1e-9, atol=1e-9)
    for block in model.blocks:
        tokens = block(tokens + sinusoid(16, 12) if block is model.blocks[0] else tokens)
    pooled = layer_normalised_pool(tokens, vit.fc_norm.weight, vit.fc_norm.bias)
    want, got = vit.head(pooled), vit(clips)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias"):
        ours = torch.autograd.grad(got.square().sum(), vit.get_parameter(name), retain_graph=True)[0]
        theirs = torch.autograd.grad(want.square().sum(), model.get_parameter(name), retain_graph=True)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_positions_of_clips_are_resized_slot_by_slot() -> None:
    table = torch.randn(1, 3 * 8, 16)
    resized = resize_slots(table, 3, (2, 4), (4, 4))
    none = torch.zeros(1, 1, 16)  # in the place of cls
    for slot, part in enumerate(resized.chunk(3, dim=1)):
        want = resize_positions(torch.cat([none, table[:, 8 * slot : 8 * slot + 8]], dim=1), (2, 4), (4, 4))
        torch.testing.assert_close(part, want[:, 1:])
    assert torch.equal(resize_slots(table, 3, (2, 4), (2, 4)), table)
    assert build_classifier(small(), 3, image_size=(8, 6))(torch.randn(1, 2, 4, 8, 6)).shape == (1, 3)


# -------------------------------------------------------------------------------------------------- the data
def clips_of(augmentation: Augmentation, repeats: int = 1, **options: Any) -> AugmentedLoader:
    shared: dict[str, Any] = {"image_size": (16, 16), "channels": 3, "seed": 3, "num_frames": 4, "batch_size": 4}
    return AugmentedLoader("synthetic:12", augmentation, LoaderOptions(**shared | options), repeats=repeats)


def test_the_frames_of_a_clip_are_augmented_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of one picture: every frame is what timm makes of that picture, and boxes are erased from all of them."""
    loader = clips_of(Augmentation("rand-m7-n4-mstd0.5-inc1", 0.0), repeats=2)
    pixels = loader.base.drawn(0, 1)
    assert pixels is not None
    assert pixels.shape == (4, 16, 16, 3)
    monkeypatch.setattr(loader.base, "drawn", lambda drawn, sample: np.repeat(pixels[:1], 4, 0))
    info = loader.info
    alike = create_transform(
        (16, 16),
        is_training=True,
        hflip=0.0,
        color_jitter=None,
        mean=info.mean,
        std=info.std,
        interpolation="bicubic",
        auto_augment="rand-m7-n4-mstd0.5-inc1",
        separate=True,
    )
    draws = [loader.images[(0, 1, 0)][0], loader.images[(0, 1, 1)][0], loader.images[(1, 1, 0)][0]]
    for clip in draws:
        assert clip.shape == (3, 4, 16, 16)
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    clip = loader.images._augment(np.repeat(pixels[:1], 4, 0), 77)  # type: ignore[union-attr]
    _seed_all(77)
    one = torch.from_numpy(np.array(alike[1](_picture(pixels[0])))).permute(2, 0, 1) / 255
    want = (one - torch.tensor(info.mean)[:, None, None]) / torch.tensor(info.std)[:, None, None]
    torch.testing.assert_close(clip[:, 2], want)
    loader.close()

    erasing = clips_of(Augmentation("", 0.999, crop_min=1.0, flip=False))
    monkeypatch.setattr(erasing.base, "drawn", lambda drawn, sample: np.repeat(pixels[:1], 4, 0))
    plain = clips_of(Augmentation("", 0.0, crop_min=1.0, flip=False))
    monkeypatch.setattr(plain.base, "drawn", lambda drawn, sample: np.repeat(pixels[:1], 4, 0))
    boxes = erasing.images[(0, 5, 0)][0] != plain.images[(0, 5, 0)][0]
    assert 0 < int(boxes.sum()) < boxes.numel() / 2
    assert torch.equal(boxes, boxes[:1, :1].expand_as(boxes))
    noise = erasing.images[(0, 5, 0)][0][:, :, boxes[0, 0]]
    assert not torch.equal(noise[:, 0], noise[:, 1])


def test_repeated_clips_do_not_depend_on_ranks_or_workers() -> None:
    def first(batch_size: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        loader = clips_of(Augmentation("rand-m7-n4-mstd0.5-inc1"), batch_size=batch_size, repeats=2, **options)
        try:
            batch = next(iter(loader))
        finally:
            loader.close()
        return batch.images, batch.labels, batch.ids

    whole = first(4, num_workers=2)
    parts = [first(2, rank=rank, world_size=2, num_workers=1) for rank in (0, 1)]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(column, torch.cat(pieces))
    assert whole[0].shape == (8, 3, 4, 16, 16)
    assert torch.equal(whole[2][::2], whole[2][1::2])
    assert not torch.equal(whole[0][::2], whole[0][1::2])


def test_a_clip_that_does_not_decode_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = clips_of(Augmentation("", 0.0))
    read = loader.base.drawn
    monkeypatch.setattr(loader.base, "drawn", lambda drawn, sample: None if sample == 5 else read(drawn, sample))
    (clip, label, sample, replaced), kept = loader.images[(0, 5, 1)], loader.images[(0, 4, 1)]
    assert (replaced, kept[2:]) == (True, (4, False))
    assert (sample != 5, label) == (True, sample % 10)
    assert clip.shape == kept[0].shape
    monkeypatch.setattr(loader.base, "drawn", lambda drawn, sample: None)
    with pytest.raises(UserError, match="sample 5 does not decode, nor do 20 in its place"):
        loader.images[(0, 5, 0)]
    loader.close()


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_the_frames_of_a_clip_are_mixed_alike(cutmix: float) -> None:
    clips, labels = torch.randn(4, 3, 5, 8, 8), torch.tensor([0, 1, 2, 0])
    mix = Mixup(0.8 * (not cutmix), cutmix, label_smoothing=0.1, num_classes=3)
    np.random.seed(5)  # noqa: NPY002
    got, targets = training.mixed(mix, clips.clone(), labels)
    assert not torch.equal(got, clips)
    for t in range(5):
        np.random.seed(5)  # noqa: NPY002
        frames, same = mix(clips[:, :, t].clone(), labels)
        assert torch.equal(got[:, :, t], frames)
        assert torch.equal(targets, same)


# -------------------------------------------------------------------------------------------------- commands
def view_by_view(folder: Path, val: Path, views: tuple[int, int]) -> tuple[float, float]:
    """Accuracy and loss of the written classifier, one view at a time: the slow twin of the batched test."""
    vit, notes = load_classifier(folder / training.CLASSIFIER_FILE)
    mean, std = (torch.tensor(notes[name])[:, None, None, None] for name in ("mean", "std"))
    rows = views[0] * views[1]
    loader = build_loader(val, batch_size=1, image_size=(16, 16), channels=3, train=False, num_frames=8, views=views)
    hits, losses = [], []
    for batch in loader:
        logits = torch.zeros(len(notes["classes"]))
        for pixels in batch.images:
            clip = (pixels.permute(3, 0, 1, 2).float() / 255 - mean) / std
            with torch.no_grad():
                logits += vit(clip[None])[0] / rows
        hits.append(float(logits.argmax() == batch.labels[0]))
        losses.append(float(-logits.log_softmax(0)[batch.labels[0]]))
    loader.close()
    return 100 * sum(hits) / len(hits), sum(losses) / len(losses)


def test_a_fine_tuning_of_videos_resumes_and_is_tested_over_views(run: Path, videos: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(finetune, run, *words(videos, "--output_dir", whole))
    start(finetune, run, *words(videos, "--output_dir", broken, "--stop_after", "1"))
    start(finetune, run, *words(videos, "--output_dir", broken))
    assert same_weights(whole / "classifier.safetensors", broken / "classifier.safetensors")
    found = read(whole / "result.json")
    assert found["protocol"] == "fine-tune, 2 epochs, 2x3 views"
    assert (found["settings"]["flip"], found["settings"]["layer_decay"]) == (False, 0.75)
    evaluate = (
        "--evaluate",
        "--val_path",
        videos,
        "--batch_size",
        "7",
        "--output_dir",
        whole,
    )  # 7: batches of one video
    once = view_by_view(whole, videos, (1, 1))
    for views, (accuracy, loss) in {"2x3": view_by_view(whole, videos, (2, 3)), "1x1": once}.items():
        start(finetune, run, *evaluate, "--test_views", views)
        tested = read(whole / "evaluate" / "result.json")
        assert tested["accuracy"] == pytest.approx(accuracy)
        assert tested["val_loss"] == pytest.approx(loss, rel=1e-4)
        if views == "2x3":
            assert found["accuracy"] == tested["accuracy"]
            assert found["val_loss"] == pytest.approx(tested["val_loss"], rel=1e-4)
            assert abs(tested["val_loss"] - once[1]) > 1e-3 * once[1]


def test_a_linear_probe_on_clips(run: Path, videos: Path, tmp_path: Path) -> None:
    paths = ("--train_path", videos, "--val_path", videos)
    flags = (run, *paths, "--epochs", "2", "--batch_size", "4", "--global_batch_size", "4", "--output_dir")
    for name, more in {"augmented": (), "cached": ("--cache_features",)}.items():
        start(linear, *flags, tmp_path / name, *more)
        found = read(tmp_path / name / "result.json")
        assert found["settings"]["pool"] == "mean"
        assert 0 <= found["accuracy"] <= 100
    assert "video models have no cls token" in refused(linear, *flags, tmp_path / "no", "--pool", "cls")


def test_what_does_not_fit_videos_is_refused(run: Path, videos: Path, tmp_path: Path) -> None:
    cases = {
        "--token_policy takes image models": ("--token_policy", "random"),
        "preset mae is not for videos": ("--preset", "mae"),
        "video models have no cls token": ("--global_pool", "token"),
        "test_views is '5', expected clips x crops": ("--test_views", "5"),
        "frame_sampling is 'sparse', expected one of dense, segments": ("--frame_sampling", "sparse"),
        "num_sample is 0, expected 1 or more": ("--num_sample", "0"),
        "holds no prepared videos": ("--train_path", "README.md/.."),
    }
    for message, more in cases.items():
        assert message in refused(finetune, run, *words(videos, "--output_dir", tmp_path / "out", *more)), message
    assert not (tmp_path / "out").exists()
    odd = words(videos, "--num_sample", "1", "--batch_size", "1")
    assert "mixup and cutmix pair" in refused(finetune, run, *odd)


def test_presets_of_videos_follow_the_run() -> None:
    with torch.device("meta"):
        base, large = (create_model(f"videomae_vit_{size}_patch16_224") for size in ("base", "large"))
    settings = {
        flip: finetune_settings.FineTune(**finetune_settings.preset("auto", base, False, flip))
        for flip in (True, False)
    }
    shown = [(s.epochs, s.blr, s.flip, s.frame_sampling, s.views) for s in settings.values()]
    assert shown == [(100, 1e-3, True, "dense", (5, 3)), (50, 5e-4, False, "segments", (2, 3))]
    for each in settings.values():
        assert (each.num_sample, each.aa, each.mixup, each.cutmix) == (2, "rand-m7-n4-mstd0.5-inc1", 0.8, 1.0)
        assert (each.smoothing, each.reprob, each.layer_decay, each.drop_path) == (0.1, 0.25, 0.75, 0.1)
        assert (each.global_batch_size, each.weight_decay) == (512, 0.05)
    assert finetune_settings.preset("auto", large, False, True)["epochs"] == 35
    assert finetune_settings.preset("auto", small(), False, False)["flip"] is False
