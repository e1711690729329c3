"""`fasthpm segment` from images and masks to results: learning, resuming, evaluating, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from fasthpm.checkpoint import load_weights
from fasthpm.dense.pairs import IGNORED
from fasthpm.dense.segmentation import command
from fasthpm.dense.segmentation.settings import RECIPES, Segment
from fasthpm.errors import UserError
from fasthpm.model import create_model
from fasthpm.run.records import read_metrics
from tests.helpers.finetuning import FLOAT32, read, refused, same_weights, start
from tests.helpers.launch import check_ranks
from tests.helpers.pairs import ade, write

SIZES = ((28, 28), (40, 28), (30, 45))
CLASSES = ("background", "bright", "dark")
FAST = ("--head_width", 8, "--input_size", 28, "--batch_size", 4, "--global_batch_size", 8, "--num_workers", 1)
SHORT = (*FAST, *FLOAT32, "--steps", 6, "--log_every", 2, "--eval_every", 4, "--save_every", 3, "--pictures", 2)


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright and a dark box on grey, its mask, and a corner that nobody labelled."""
    random, size = np.random.default_rng(seed), SIZES[seed % len(SIZES)]
    image, mask = np.full((*size, 3), 128, np.uint8), np.zeros(size, np.uint8)
    for label, value in ((1, 240), (2, 10)):
        row, column = random.integers(0, size[0] - 12), random.integers(0, size[1] - 12)
        image[row : row + 12, column : column + 12] = value
        mask[row : row + 12, column : column + 12] = label
    mask[:3, :3] = IGNORED
    return image + random.integers(0, 9, image.shape, dtype=np.uint8), mask


def folder_of(root: Path, train: int, val: int) -> Path:
    for split, numbers in (("train", range(train)), ("val", range(100, 100 + val))):
        for number in numbers:
            image, mask = scene(number)
            write(root / split / "images" / f"{number}.png", image)
            write(root / split / "masks" / f"{number}.png", mask)
    (root / "classes.txt").write_text("\n".join(CLASSES[1:]))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("scenes") / "data", 20, 7)


@pytest.fixture(scope="module")
def trained(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("segment") / "out"
    start(command, run, "--data_path", data, *SHORT, "--output_dir", out)
    return out


def test_it_learns_what_is_bright_and_what_is_dark(run: Path, data: Path, tmp_path: Path) -> None:
    words = (*FAST, *FLOAT32, "--steps", 40, "--lr", 0.01, "--no-distort", "--output_dir", tmp_path / "out")
    start(command, run, "--data_path", data, *words, "--resize_min", 0.9, "--resize_max", 1.1)
    assert read(tmp_path / "out" / "result.json")["miou"] > 45  # all background: 25


def test_results_are_written_with_a_row_per_class_and_pictures(run: Path, trained: Path) -> None:
    result = read(trained / "result.json")
    assert result["protocol"] == "segment, 6 updates of 8"
    assert [row["class"] for row in result["classes"]] == list(CLASSES)
    assert sum(row["pixels"] for row in result["classes"]) > 0
    assert 0 <= result["miou"] <= result["best_miou"] <= 100
    assert "| bright |" in (trained / "result.md").read_text()
    with Image.open(trained / "pictures.png") as sheet:
        assert sheet.width > 500
    records = read_metrics(trained)
    assert [record["step"] for record in records if "miou" in record] == [4, 6]
    assert records[0]["loss"] == pytest.approx(records[0]["loss_seg"] + records[0]["loss_aux"], rel=1e-5)
    weights = load_file(trained / "network.safetensors")
    assert weights["net.decode_head.classifier.weight"].shape == (3, 8, 1, 1)
    assert weights["net.decode_head.bottleneck.batch_norm.running_mean"].abs().sum() > 0
    assert load_weights(run, "student")[0].in_chans == 1  # grey: the images above are coloured


def test_evaluate_gives_the_figures_of_the_last_test(run: Path, data: Path, trained: Path) -> None:
    words = (run, "--data_path", data, *SHORT, "--output_dir", trained, "--evaluate")
    start(command, *words)
    found, expected = read(trained / "evaluate" / "result.json"), read(trained / "result.json")
    for name in ("miou", "macc", "aacc", "classes"):
        assert found[name] == expected[name]
    assert (trained / "evaluate" / "pictures.png").is_file()
    start(command, *words, "--whole")
    assert 0 < read(trained / "evaluate" / "result.json")["aacc"] <= 100


def test_flags_that_say_what_the_test_data_are_replace_those_of_the_training(
    run: Path, data: Path, trained: Path, tmp_path: Path
) -> None:
    """Folders of one's own instead of a data_path, and what a mask's values mean."""
    own = ("--val_images", data / "val" / "images", "--val_masks", data / "val" / "masks")
    words = (run, "--output_dir", trained, "--evaluate", "--num_workers", 1, "--pictures", 0)
    meaning = ("--classes", data / "classes.txt", "--background", "class")
    (trained / "evaluate" / "pictures.png").parent.mkdir(exist_ok=True)
    (trained / "evaluate" / "pictures.png").write_bytes(b"of an earlier test")
    found = start(command, *words, *own, *meaning)
    assert found.figures["miou"] == read(trained / "result.json")["miou"]
    assert found.picture is None
    assert read(trained / "evaluate" / "result.json")["settings"]["data_path"] == ""
    for more, said in (
        (("--classes", tmp_path / "none"), "none cannot be read"),
        (("--background", "ignore"), "has 3 classes, "),
        (("--ignore_index", 2), "expected 0 (background) to 2 (dark), and 2 (ignored)"),
        (own, "--classes is missing"),
        ((*own, *meaning, "--data_path", data), "both --data_path and --val_images are given"),
        (("--head_width", 9), "--head_width is 9, and the network in"),
        (("--recipe", "upernet_vit_base_ade20k_80k"), "--recipe upernet_vit_base_ade20k_80k has distort True, and"),
        (("--resume", trained), "--evaluate tests the newest checkpoint of output_dir; leave it out"),
    ):
        assert said in refused(command, *words, *more)


def test_two_ranks_stopped_and_resumed_end_with_the_same_bits(run: Path, data: Path, tmp_path: Path) -> None:
    """Norms over both ranks, drop path, dropout, and a test whose images the ranks have not equally many of."""
    words = (run, "--data_path", data, *SHORT, "--drop_path", 0.2, "--relative_positions", "--layer_scale", 1.0)
    module, options = "fasthpm.dense.segmentation", {"ranks": 2, "launcher": "forked"}
    check_ranks(module, *words, "--output_dir", tmp_path / "whole", **options)
    output = check_ranks(module, *words, "--output_dir", tmp_path / "parts", "--stop_after", 4, **options)
    assert "stopped at update 4 of 6; run the same command to continue" in output
    output = check_ranks(module, *words, "--output_dir", tmp_path / "parts", **options)
    assert "resuming from" in output
    assert same_weights(tmp_path / "whole" / "network.safetensors", tmp_path / "parts" / "network.safetensors")
    whole, parts = (read(tmp_path / name / "result.json") for name in ("whole", "parts"))
    assert whole["classes"] == parts["classes"]


def test_from_scratch_has_a_folder_of_its_own_and_begins_elsewhere(run: Path, data: Path, trained: Path) -> None:
    start(command, run, "--data_path", data, *SHORT, "--from_scratch")
    folder = run / "segment_scratch"
    assert read(folder / "result.json")["protocol"].endswith("from scratch")
    assert not same_weights(folder / "network.safetensors", trained / "network.safetensors")


def test_bad_samples_at_run_time_are_replaced_counted_and_listed(run: Path, data: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(data, tmp_path / "bad")
    path = bad / "train" / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    start(command, run, "--data_path", bad, *SHORT, "--max_bad_samples", 0.2, "--output_dir", tmp_path / "out")
    assert read_metrics(tmp_path / "out")[-1]["bad_samples"] == 1
    assert "images/3.png" in (tmp_path / "out" / "bad_samples.csv").read_text()


NEW = ("--output_dir", "{new}")  # else it is another training's folder
WRONG: list[tuple[tuple[object, ...], str]] = [
    (("--batch_size", 1), "batch_size is 1 on one device, and UPerNet's norms need two images at a time"),
    (("--input_size", 30, *NEW), "input_size is 30x30, expected a multiple of patch_size 4, at least twice; use e.g."),
    (("--resize_min", 3), "resize_min is 3, expected at most resize_max 1.5"),
    (("--stride", 40), "stride is 40, expected at most the crop's side 28"),
    (("--stride", 9, "--whole"), "--stride has no effect here: --whole tests whole images, without windows; leave it"),
    (("--relative_positions", "--input_size", "28x32", *NEW), "relative_positions needs square crops"),
    (("--recipe", "upernet_smal"), "unknown recipe 'upernet_smal' (did you mean 'upernet_small'?)"),
    (("--layer_scale", 1, "--deepspeed_config", "zero3_bf16", *NEW), "layer_scale does not train under ZeRO 3"),
    (("--head_widht", 3), "unknown argument '--head_widht'"),
    (("--lr", 1e-4), "belongs to a segmentation with other settings (lr 0.003, here 0.0001)"),
    (("--head_width", 9), "belongs to a segmentation with other settings (head_width 8, here 9)"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_flags_are_one_line(
    run: Path, data: Path, trained: Path, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    spelled = [str(word).format(new=tmp_path / "new") for word in words]
    said = refused(command, run, "--data_path", data, *SHORT, "--output_dir", trained, *spelled)
    assert not (tmp_path / "new").exists()
    assert message.partition(" (did")[0] in said


def test_wrong_data_is_one_line_before_the_first_update(run: Path, data: Path, tmp_path: Path) -> None:
    def said(root: Path, *words: object) -> str:
        return refused(command, run, "--data_path", root, *SHORT, "--output_dir", tmp_path / "out", *words)

    assert "has no train/masks" in said(tmp_path)
    other = shutil.copytree(data, tmp_path / "labels")
    write(other / "train" / "masks" / "0.png", np.full((28, 28), 9, np.uint8))
    assert "has a mask" in said(other)
    assert "with the value 9" in said(other)
    sizes = shutil.copytree(data, tmp_path / "sizes")
    write(sizes / "train" / "masks" / "1.png", np.zeros((28, 28), np.uint8))
    assert "its mask 28 x 28" in said(sizes)
    few = folder_of(tmp_path / "few", 5, 2)
    assert "has 5 samples for training, fewer than the 8 of an update" in said(few)
    assert not (tmp_path / "out").exists()


def test_a_network_of_other_classes_is_not_evaluated(run: Path, trained: Path, tmp_path: Path) -> None:
    other = ade(tmp_path / "ade", [np.full((30, 30), 5, np.uint8)] * 2)
    words = (run, "--data_path", other, *SHORT, "--output_dir", trained, "--evaluate")
    assert "has 3 classes" in refused(command, *words)


def test_recipes_are_the_protocols_and_auto_takes_what_fits() -> None:
    base = RECIPES["upernet_vit_base_ade20k_160k"]()
    assert (base.steps, base.lr, base.global_batch_size, base.head_width) == (160_000, 1e-4, 16, 768)
    assert (base.test_side, base.strides, base.image_size) == (512, (341, 341), (512, 512))
    large = RECIPES["upernet_vit_large_ade20k_80k"]()
    assert (large.steps, large.lr, large.head_width) == (80_000, 2e-5, 1024)
    for name, size in (("nano_patch4_28", "upernet_small"), ("tiny_patch16_224", "upernet_vit_base_ade20k_160k")):
        assert command.TASK.recipe_for(create_model(f"mae_vit_{name}"), {}) == size
    for name, recipe in RECIPES.items():
        assert isinstance(recipe(), Segment)
        assert recipe.__name__ == name
        assert "Ours: not yet run." in (recipe.__doc__ or "") or name == "upernet_small"
    with pytest.raises(UserError, match="cat_max_ratio is 0"):
        Segment(cat_max_ratio=0.0)


def test_samples_of_other_sizes_stay_apart() -> None:
    images, masks = command.collate([scene(0)[::1], scene(3)])
    assert images.shape == (2, 28, 28, 3)  # alike: as they come
    assert masks.shape == (2, 28, 28)
    images, masks = command.collate([scene(0), scene(1)])
    assert [tuple(mask.shape) for mask in masks] == [(28, 28), (40, 28)]
    assert command.collate([]) == ([], [])


def test_settings_are_said_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start(command, "--help")
    text = capsys.readouterr().out
    assert "fasthpm segment RUN --data_path" in text
    assert "--cat_max_ratio" in text
