"""`fasthpm detect`, from a run to AP: with the real engine, on small sets in COCO's form."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fasthpm.dense.detection import command
from fasthpm.dense.detection.settings import Detect
from fasthpm.run.records import read_metrics
from tests.helpers import finetuning
from tests.helpers.finetuning import read, same_weights
from tests.helpers.launch import check_ranks

FLOAT32 = ("--deepspeed_config", "ds_configs/zero1_fp32.json")
SIDE = 32
TINY = ("--input_size", SIDE, "--steps", 6, "--batch_size", 2, "--global_batch_size", 4, "--num_workers", 1)
SHORT = (*TINY, "--save_every", 3, "--eval_every", 0, "--log_every", 2, *FLOAT32)


def scene(generator: np.random.Generator, objects: int) -> tuple[np.ndarray, list[Any]]:
    """A dark image with bright rectangles (class 1) and squares (class 2); (class, box) of each."""
    pixels, things = np.full((SIDE, SIDE, 3), 30, np.uint8), []
    for _ in range(objects):
        label = int(generator.integers(1, 3))
        wide, tall = (12, 12) if label == 2 else (16, 8)
        left, top = (int(generator.integers(0, SIDE - length)) for length in (wide, tall))
        pixels[top : top + tall, left : left + wide] = 120 * label
        things.append((label, (left, top, wide, tall)))
    return pixels, things


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 16 images to train on and 6 to test, one of them without an object."""
    root = tmp_path_factory.mktemp("scenes")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        (root / split / "images").mkdir(parents=True)
        images, rows = [], []
        for number in range(count):
            pixels, things = scene(generator, 0 if split == "val" and number == 2 else int(generator.integers(1, 3)))
            name = f"{number}.png"
            Image.fromarray(pixels).save(root / split / "images" / name)
            images.append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
            for label, (left, top, wide, tall) in things:
                corners = [left, top, left + wide, top, left + wide, top + tall, left, top + tall]
                row = {"id": len(rows) + 1, "image_id": number, "category_id": label, "iscrowd": 0}
                rows.append({**row, "bbox": [left, top, wide, tall], "area": wide * tall, "segmentation": [corners]})
        categories = [{"id": 1, "name": "bar"}, {"id": 2, "name": "square"}]
        content = {"images": images, "annotations": rows, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


start, refused = (functools.partial(each, command) for each in (finetuning.start, finetuning.refused))


@pytest.fixture(scope="module")
def trained(run: Path, data: Path) -> Path:
    found = start(run, "--data_path", data, *SHORT)
    assert found.finished
    return run / "detect"


def test_it_trains_tests_draws_and_writes_what_it_found(trained: Path) -> None:
    result = read(trained / "result.json")
    assert {"mask_ap", "box_ap", "mask_ap50", "best_mask_ap"} < result.keys()
    assert [row["class"] for row in result["classes"]] == ["bar", "square"]
    assert {"mask_ap", "box_ap"} < result["classes"][0].keys()
    assert "| bar |" in (trained / "result.md").read_text()
    with Image.open(trained / "pictures.png") as picture:
        assert picture.width > 2 * 256
    records = read_metrics(trained)
    losses = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    assert records[0]["loss"] == pytest.approx(sum(records[0][name] for name in losses), rel=1e-6)
    tensors = load_file(trained / "network.safetensors")
    assert "backbone.body.blocks.0.attn.qkv.weight" in tensors
    assert "roi_heads.mask_predictor.mask_fcn_logits.bias" in tensors


def test_evaluate_gives_the_same_figures(run: Path, data: Path, trained: Path) -> None:
    """Also of the test set by its own file; of a set with other classes it is refused."""
    before = read(trained / "result.json")
    words = ("--evaluate", "--val_json", data / "val.json", "--val_images", data / "val" / "images")
    found = start(run, *words, "--output_dir", trained)
    assert found.figures["box_ap"] == pytest.approx(before["box_ap"], abs=1e-6)
    content = json.loads((data / "val.json").read_text())
    content["categories"].append({"id": 9, "name": "star"})
    (data / "other.json").write_text(json.dumps(content))
    words = ("--evaluate", "--val_json", data / "other.json", "--val_images", data / "val" / "images")
    assert "has 2 classes" in refused(run, *words, "--output_dir", trained)


def test_stopped_and_resumed_it_ends_with_the_same_bits(run: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    words = ("--data_path", data, *SHORT, "--output_dir", tmp_path / "out")
    assert not start(run, *words, "--stop_after", 4).finished
    assert start(run, *words).finished
    assert same_weights(tmp_path / "out" / "network.safetensors", trained / "network.safetensors")


def test_two_ranks_one_without_objects_resume_with_the_same_bits(run: Path, data: Path, tmp_path: Path) -> None:
    """In bfloat16 under ZeRO 1. Most images have no object, so that ranks have none again and again."""
    content = json.loads((data / "train.json").read_text())
    content["annotations"] = content["annotations"][:2]
    path = data / "few.json"
    path.write_text(json.dumps(content))
    words = (run, "--train_json", path, "--train_images", data / "train" / "images", "--keep_empty")
    words += ("--val_json", data / "val.json", "--val_images", data / "val" / "images", *SHORT[:-2])
    words += ("--deepspeed_config", "ds_configs/zero1_bf16.json", "--pictures", 0, "--output_dir")
    module = "fasthpm.dense.detection"
    check_ranks(module, *words, tmp_path / "whole", ranks=2, launcher="forked")
    check_ranks(module, *words, tmp_path / "parts", "--stop_after", 4, ranks=2, launcher="forked")
    check_ranks(module, *words, tmp_path / "parts", ranks=2, launcher="forked")
    assert same_weights(tmp_path / "whole" / "network.safetensors", tmp_path / "parts" / "network.safetensors")
    losses = [record["loss"] for record in read_metrics(tmp_path / "whole")]
    assert all(np.isfinite(losses))


def test_figures_do_not_depend_on_the_ranks(run: Path, data: Path, trained: Path) -> None:
    """Six images by two ranks in batches of two: one of them has none in the last batch, and runs along."""
    before = start(run, "--evaluate", "--output_dir", trained, "--pictures", 0).figures
    words = (run, "--evaluate", "--output_dir", trained, "--pictures", 0)
    check_ranks("fasthpm.dense.detection", *words, ranks=2, launcher="forked")
    after = read(trained / "evaluate" / "result.json")
    assert after["mask_ap"] == pytest.approx(before["mask_ap"], abs=1e-6)
    assert after["box_ap50"] == pytest.approx(before["box_ap50"], abs=1e-6)


def test_lvis_trains_too(run: Path, data: Path, tmp_path: Path) -> None:
    """Its classes by sigmoids, its images repeated; AP of rare and frequent classes."""
    for split in ("train", "val"):
        content = json.loads((data / f"{split}.json").read_text())
        for category, frequency in zip(content["categories"], "rf", strict=True):
            category["frequency"] = frequency
        for image in content["images"]:
            image |= {"neg_category_ids": [1], "not_exhaustive_category_ids": []}
            image["coco_url"] = f"http://images/{split}/images/{image.pop('file_name')}"
        (data / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    words = [word for split in ("train", "val") for word in (f"--{split}_json", data / f"lvis_v1_{split}.json")]
    words += ["--train_images", data / "train", "--val_images", data / "val"]
    words += ["--loss", "federated", "--repeat_threshold", 0.9]
    found = start(run, *words, *SHORT, "--output_dir", tmp_path / "out")
    assert {"box_ap_rare", "mask_ap_frequent"} < found.figures.keys()
    assert start(run, *words, "--evaluate", "--output_dir", tmp_path / "out").figures.keys() >= {"box_ap_rare"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--data_path is missing; give it, or --train_json and --train_images"),
        (("--data_path", "{tmp}"), "holds none of train.json"),
        (("--data_path", "{tmp}/none"), "is no folder"),
        (("--train_json", "a.json"), "--train_json is given without --train_images; give both"),
        (
            ("--data_path", "{data}", "--input_size", "30", "--output_dir", "{tmp}/out"),
            "input_size 30 is not a multiple of the run's patch_size 4; use",
        ),
        (("--data_path", "{data}", "--input_size", "32x48"), "give one side"),
        (
            ("--data_path", "x", "--train_json", "a", "--val_json", "b"),
            "--train_json and --val_json name the files; leave",
        ),
        (("--data_path", "x", "--evaluate", "--val_json", "b"), "--data_path has no effect here: --val_json name"),
        (("--data_path", "{data}", "--recipe", "maskrcnn_smal"), "did you mean 'maskrcnn_small'?"),
        (("--data_path", "{data}", "--output_dir", "{run}"), "holds checkpoints of another kind"),
        (("--data_path", "{data}", "--loss", "federated"), "(loss 'softmax', here 'federated')"),
    ],
)
def test_wrong_input_is_one_line(run: Path, data: Path, trained: Path, tmp_path: Path, words: Any, said: str) -> None:
    filled = [str(word).format(run=run, tmp=tmp_path, data=data) for word in words]
    given = SHORT if "--input_size" not in filled else SHORT[2:]
    assert said in refused(run, *given, *filled)


def test_a_bad_image_is_replaced_in_training_and_an_error_in_tests(run: Path, data: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        content = json.loads((data / f"{split}.json").read_text())
        folder = tmp_path / split
        folder.mkdir()
        for image in content["images"]:
            (folder / image["file_name"]).write_bytes((data / split / "images" / image["file_name"]).read_bytes())
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    words = [
        w for s in ("train", "val") for w in (f"--{s}_json", tmp_path / f"{s}.json", f"--{s}_images", tmp_path / s)
    ]
    (tmp_path / "train" / "3.png").write_bytes(b"torn")
    out = tmp_path / "out"
    assert start(run, *words, *SHORT, "--output_dir", out).finished
    assert read_metrics(out)[-1]["bad_samples"] == 1
    assert "3.png,cannot be read as an image" in (out / "bad_samples.csv").read_text()
    (tmp_path / "val" / "3.png").write_bytes(b"torn")
    assert "3.png cannot be read as an image" in refused(run, *words, "--evaluate", "--output_dir", out)


def test_grey_runs_read_grey_images(run: Path) -> None:
    """The fixture's run is grey: what it trained on had one channel, and no word was said."""
    tensors = load_file(run / "detect" / "network.safetensors")
    assert tensors["backbone.body.patch_embed.proj.weight"].shape[1] == 1
    assert torch.isfinite(tensors["backbone.body.pos_embed"]).all()


def test_a_network_of_others_is_asked_for_what_the_flags_say() -> None:
    network = SimpleNamespace(roi_heads=SimpleNamespace(score_thresh=0.05, detections_per_img=100))
    command.TASK.settle(network, Detect())
    assert vars(network.roi_heads) == {"score_thresh": 0.05, "detections_per_img": 100}
    command.TASK.settle(network, Detect(score=0.3, detections=7))
    assert vars(network.roi_heads) == {"score_thresh": 0.3, "detections_per_img": 7}
