"""The compiled decoding loop against PIL, torchvision and plain numpy, and against damaged files."""

import subprocess
import sys
import threading
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch
from numba import types
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from fasthpm.data.ffcv.kernel import AREA, BICUBIC, DAMAGED, FOREIGN
from fasthpm.data.sampling import area_resize, random_crops
from tests.helpers.jpegs import RAW, RESTARTS, Samples, jpeg, photograph
from tests.helpers.launch import ROOT


def opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


def samples_of(images: list[Image.Image], **options: object) -> Samples:
    return Samples([jpeg(image, **options) for image in images], [image.size[::-1] for image in images])


def raw_of(images: list[Image.Image]) -> Samples:
    return Samples([np.asarray(image).tobytes() for image in images], [image.size[::-1] for image in images], RAW)


def by_pil(image: Image.Image, crop: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """The slow way: cut, resize, flip; int64 [H, W, 3]."""
    top, left, height, width, flipped = (int(value) for value in crop)
    cut = image.crop((left, top, left + width, top + height))
    if interpolation == BICUBIC:
        out = np.asarray(cut.resize(size[::-1], Image.Resampling.BICUBIC))
    else:
        out = area_resize(np.asarray(cut), size)
    return (out[:, ::-1] if flipped else out).astype(np.int64)


def assert_like_pil(images, pictures, crops, size, interpolation, *, most, mean) -> None:
    errors = [
        np.abs(by_pil(picture, crop, size, interpolation) - image)
        for image, picture, crop in zip(images, pictures, crops, strict=True)
    ]
    assert max(error.max() for error in errors) <= most
    assert np.mean([error.mean() for error in errors]) <= mean


# ------------------------------------------------------------------------------------------------------------- pixels
SIZES = [(375, 500), (500, 333), (64, 47), (31, 200), (17, 16), (224, 224), (9, 5), (33, 31)]


@pytest.mark.parametrize("interpolation", [AREA, BICUBIC])
@pytest.mark.parametrize("size", [(64, 48), (224, 224), (7, 19)])
def test_raw_pixels_are_resized_as_pil_does(interpolation: int, size: tuple[int, int]) -> None:
    pictures = [photograph(index, *shape) for index, shape in enumerate(SIZES)]
    samples = raw_of(pictures)
    for epoch in range(3):
        crops = random_crops(1, epoch, np.arange(len(SIZES)), samples.sizes, 0.05, True)
        images, status = samples.decode(crops, size, interpolation=interpolation)
        assert not status.any()
        assert_like_pil(images, pictures, crops, size, interpolation, most=2, mean=0.25)


@pytest.mark.parametrize("restarts", RESTARTS, ids=["whole", "by-1", "by-3", "by-row"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("interpolation", [AREA, BICUBIC])
def test_jpegs_are_decoded_and_resized_as_pil_does(
    subsampling: str, restarts: dict[str, Any], interpolation: int
) -> None:
    """Chroma too, although it is never brought to full size here; and of partial JPEGs as of whole ones."""
    samples = samples_of(
        [photograph(index, *shape) for index, shape in enumerate(SIZES)], subsampling=subsampling, **restarts
    )
    pictures = [opened(array.tobytes()) for array in samples.memory]
    for epoch, size in enumerate([(64, 48), (150, 170), (9, 11)]):
        crops = random_crops(2, epoch, np.arange(len(SIZES)), samples.sizes, 0.05, True)
        images, status = samples.decode(crops, size, interpolation=interpolation)
        assert not status.any()
        assert_like_pil(images, pictures, crops, size, interpolation, most=3, mean=0.38)


@pytest.mark.parametrize("restart", [0, 1, 2])
@pytest.mark.parametrize("sampling", [0x411111, 0x121111])  # 4:1:1 and 4:4:0
def test_rarer_chroma(sampling: int, restart: int) -> None:
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling, cv2.IMWRITE_JPEG_RST_INTERVAL, restart]
    blobs = [
        cv2.imencode(".jpg", np.array(photograph(i, *shape)), options)[1].tobytes() for i, shape in enumerate(SIZES)
    ]
    samples = Samples(blobs, SIZES)
    crops = random_crops(5, 0, np.arange(len(SIZES)), samples.sizes, 0.05, True)
    images, status = samples.decode(crops, (64, 48))
    assert not status.any()
    assert_like_pil(images, [opened(blob) for blob in blobs], crops, (64, 48), BICUBIC, most=3, mean=0.38)


@pytest.mark.parametrize("options", [{"progressive": True}, {"quality": 100}, {"optimize": True}, {"quality": 20}])
def test_other_jpegs(options: dict[str, Any]) -> None:
    pictures = [photograph(index, 90, 120) for index in range(3)]
    samples = samples_of(pictures, **options)
    crops = [[3, 5, 60, 70, 0], [0, 0, 90, 120, 1], [40, 50, 50, 70, 0]]
    images, status = samples.decode(crops, (32, 40))
    assert not status.any()
    decoded = [opened(array.tobytes()) for array in samples.memory]
    assert_like_pil(images, decoded, np.array(crops), (32, 40), BICUBIC, most=3, mean=0.38)


def cubic_matrix(length: int, out: int) -> np.ndarray:
    """The bicubic weights as PIL defines them: float64 [out, length]."""
    scale = length / out
    x = np.abs((np.arange(length) + 0.5 - (np.arange(out)[:, None] + 0.5) * scale) / max(scale, 1))
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", [(50, 70), (13, 9), (200, 31), (8, 8)])
def test_bicubic_of_noise_is_exact(shape: tuple[int, int]) -> None:
    """PIL rounds and clips between its two passes, which shows at hard edges: here the sum without that."""
    pixels = np.random.default_rng(9).choice(np.array([0, 255, 90], np.uint8), (*shape, 3))
    images, _ = raw_of([Image.fromarray(pixels)]).decode([[0, 0, *shape, 0]], (24, 40))
    exact = np.einsum("yh,hwc,xw->yxc", cubic_matrix(shape[0], 24), pixels, cubic_matrix(shape[1], 40))
    assert np.abs(exact.clip(0, 255) - images[0]).max() <= 0.51


def test_partial_decoding_changes_nothing() -> None:
    """The same coefficients, with restart markers and without, give the same pixels, bit for bit."""
    pictures = [photograph(index, 250, 301) for index in range(6)]
    plain, marked = (samples_of(pictures, **options) for options in ({}, {"restart_marker_blocks": 1}))
    for epoch in range(4):
        crops = random_crops(3, epoch, np.arange(6), plain.sizes, 0.02, True)
        assert np.array_equal(plain.decode(crops, (48, 48))[0], marked.decode(crops, (48, 48))[0])


def test_partial_decoding_does_not_read_what_it_skips() -> None:
    data = bytearray(jpeg(photograph(1, 160, 160), restart_marker_blocks=1))
    scan = data.index(b"\xff\xda")
    damaged = Samples([bytes(data[: scan + (len(data) - scan) // 2])], [(160, 160)])
    whole = Samples([bytes(data)], [(160, 160)])
    crop = [[0, 60, 40, 40, 0]]
    images, status = damaged.decode(crop, (32, 32))
    assert status == 0
    assert np.array_equal(images, whole.decode(crop, (32, 32))[0])
    assert damaged.decode([[100, 60, 40, 40, 0]], (32, 32))[1] == DAMAGED


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 3), (5, 4), (16, 17)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0", "4:2:2"])
def test_tiny_images(shape: tuple[int, int], subsampling: str) -> None:
    image = photograph(3, *shape)
    samples = samples_of([image], subsampling=subsampling)
    decoded = opened(samples.memory[0].tobytes())
    for interpolation in (AREA, BICUBIC):
        crops = np.array([[0, 0, *shape, 1]])
        images, status = samples.decode(crops, (12, 8), interpolation=interpolation)
        assert status == 0
        assert_like_pil(images, [decoded], crops, (12, 8), interpolation, most=5, mean=1)


def test_one_pixel_crops_see_nothing_else() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    samples = raw_of([Image.fromarray(pixels)])
    crops = [[y, x, 1, 1, 0] for y in range(7) for x in range(9)]
    for interpolation in (AREA, BICUBIC):
        images, _ = samples.decode(crops, (5, 6), ids=np.zeros(63, int), interpolation=interpolation)
        assert (images == pixels.reshape(63, 1, 1, 3)).all()


def test_no_pixel_outside_the_crop_leaks_in() -> None:
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[20:40, 15:45] = 200
    samples = raw_of([Image.fromarray(pixels)])
    for size in ((9, 9), (20, 30), (77, 81)):
        for interpolation in (AREA, BICUBIC):
            assert (samples.decode([[20, 15, 20, 30, 0]], size, interpolation=interpolation)[0] == 200).all()


def test_same_size_copies() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (33, 41, 3), dtype=np.uint8)
    samples = raw_of([Image.fromarray(pixels)])
    for interpolation in (AREA, BICUBIC):
        assert np.array_equal(
            samples.decode([[3, 4, 20, 30, 0]], (20, 30), interpolation=interpolation)[0][0], pixels[3:23, 4:34]
        )


def test_flip_mirrors_exactly() -> None:
    samples = samples_of([photograph(4, 100, 130)])
    plain, _ = samples.decode([[10, 20, 70, 90, 0]], (40, 50))
    flipped, _ = samples.decode([[10, 20, 70, 90, 1]], (40, 50))
    assert np.array_equal(plain[:, :, ::-1], flipped)


def test_large_images_shrink() -> None:
    image = photograph(5, 1400, 2100)
    for samples in (samples_of([image]), raw_of([image])):
        source = image if samples.table[2][0] == RAW else opened(samples.memory[0].tobytes())
        crops = np.array([[100, 50, 1300, 2000, 0]])
        for interpolation in (AREA, BICUBIC):
            images, status = samples.decode(crops, (30, 20), interpolation=interpolation)
            assert status == 0
            assert_like_pil(images, [source], crops, (30, 20), interpolation, most=2, mean=0.4)


def test_one_channel() -> None:
    """Luma of JPEGs, the first channel of raw pixels, and grey JPEGs as three equal channels."""
    image = photograph(6, 80, 90)
    grey = image.convert("L")
    crop = np.array([[5, 6, 60, 70, 0]])
    data = jpeg(image)
    colour, first, only = samples_of([image]), raw_of([image]), samples_of([grey])
    luma = Image.open(BytesIO(data))
    luma.draft("L", None)
    for samples, source in ((colour, luma), (first, image.getchannel(0)), (only, Image.open(BytesIO(jpeg(grey))))):
        images, status = samples.decode(crop, (32, 32), channels=1)
        assert status == 0
        assert np.abs(images[0] - by_pil(source.convert("RGB"), crop[0], (32, 32), BICUBIC)[..., :1]).max() <= 2
    three, _ = only.decode(crop, (32, 32))
    assert (three == only.decode(crop, (32, 32), channels=1)[0]).all()


def test_rgb_jpegs_without_ycc() -> None:
    image = photograph(7, 50, 60)
    samples = samples_of([image], keep_rgb=True, subsampling=0)
    images, status = samples.decode([[0, 0, 50, 60, 0]], (25, 30))
    assert status == 0
    assert (
        np.abs(images[0] - by_pil(opened(samples.memory[0].tobytes()), [0, 0, 50, 60, 0], (25, 30), BICUBIC)).max() <= 2
    )


# ------------------------------------------------------------------------------------------------------------- jitter
def by_torchvision(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    tensor = reference.adjust_brightness(tensor, float(factors[0]))
    tensor = reference.adjust_contrast(tensor, float(factors[1]))
    return reference.adjust_saturation(tensor, float(factors[2])).permute(1, 2, 0).numpy().astype(np.int64)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions(channels: int) -> None:
    samples = raw_of([photograph(8, 64, 64)])
    factors = np.random.default_rng(2).uniform(0, 2, (12, 3)).astype(np.float32)
    factors[:3] = [[0.5, 1, 1], [1, 1.7, 1], [1, 1, 0.2]]
    crops, ids = np.array([[2, 3, 50, 40, 0]] * 12), np.zeros(12, np.int64)
    plain, _ = samples.decode(crops, (32, 32), ids=ids, channels=channels)
    images, _ = samples.decode(crops, (32, 32), ids=ids, channels=channels, jitter=factors)
    for image, source, factor in zip(images, plain, factors, strict=True):
        error = np.abs(by_torchvision(source, factor) - image)
        assert error.max() <= 2
        assert error.mean() <= 0.1


# ------------------------------------------------------------------------------------------------------------ damage
def cmyk() -> bytes:
    return jpeg(photograph(9, 40, 40).convert("CMYK"))


def damaged_jpegs() -> dict[str, tuple[bytes, int]]:
    good = jpeg(photograph(9, 40, 40))
    scan = good.index(b"\xff\xda") + 14
    return {
        "truncated": (good[: scan + (len(good) - scan) // 2], DAMAGED),
        "no end": (good[:-20], DAMAGED),
        "garbage": (good[:scan] + bytes(range(1, 200)), DAMAGED),
        "header only": (good[:20], FOREIGN),
        "one byte": (b"\xff", FOREIGN),
        "noise": (np.random.default_rng(3).bytes(500), FOREIGN),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), FOREIGN),
        "other size": (jpeg(photograph(9, 40, 41)), FOREIGN),
        "larger": (jpeg(photograph(9, 400, 400)), FOREIGN),
        "cmyk": (cmyk(), FOREIGN),
        "no tables": (good.replace(b"\xff\xdb", b"\xff\xfe"), DAMAGED),
    }


@pytest.mark.parametrize("name", damaged_jpegs())
def test_damaged_jpegs_are_reported_and_left_black(name: str) -> None:
    data, expected = damaged_jpegs()[name]
    good = jpeg(photograph(9, 40, 40))
    samples = Samples([good, data, good], [(40, 40)] * 3)
    images, status = samples.decode([[0, 0, 40, 40, 0]] * 3, (16, 16))
    assert status.tolist() == [0, expected, 0]
    assert not images[1].any()
    assert np.array_equal(images[0], images[2])
    assert images[0].any()


@pytest.mark.parametrize(
    "crop", [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 41, 5), (0, 30, 5, 11), (0, 0, 0, 5), (0, 0, 5, 0)]
)
def test_crops_outside_the_image_are_refused(crop: tuple[int, ...]) -> None:
    for samples in (samples_of([photograph(1, 40, 40)]), raw_of([photograph(1, 40, 40)])):
        images, status = samples.decode([[*crop, 0]], (8, 8))
        assert status == FOREIGN
        assert not images.any()


def test_ffcvs_loader_in_the_same_process() -> None:
    """It marks numba's type of byte arrays read-only, on which calls with such arrays used to fail."""
    types.Array(types.uint8, 1, "C").mutable = False
    images, status = raw_of([photograph(1, 9, 9)]).decode([[0, 0, 9, 9, 0]], (9, 9))
    assert status == 0
    assert np.array_equal(images[0], np.asarray(photograph(1, 9, 9)))
    assert types.Array(types.uint8, 1, "C").mutable


def test_an_empty_batch_is_nothing() -> None:
    images, status = raw_of([photograph(1, 4, 4)]).decode(np.zeros((0, 5)), (8, 8), ids=[])
    assert len(images) == len(status) == 0


FUZZ = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from hypothesis import given, settings, strategies as st
from tests.helpers.jpegs import RESTARTS, Samples, jpeg, photograph

ORIGINALS = [
    jpeg(photograph(index, 45, 70), subsampling=subsampling, **options)
    for index, subsampling in enumerate(("4:4:4", "4:2:2", "4:2:0"))
    for options in (*RESTARTS, {{"progressive": True}})
]
CROPS = [[0, 0, 45, 70, 0], [20, 30, 10, 12, 1]]
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from(("set", "cut", "insert", "drop"))),
                 min_size=1, max_size=8)

@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(st.sampled_from(ORIGINALS), edits, st.booleans())
def mutate(original, changes, header):
    data = bytearray(original)
    for where, value, kind in changes:
        at = min(int(where * (700 if header else len(data))), len(data) - 1)
        if kind == "set":
            data[at] = value
        elif kind == "insert":
            data.insert(at, value)
        elif kind == "drop" and len(data) > 2:
            del data[at]
        elif kind == "cut" and at:
            del data[max(at, len(data) - 40):]
    samples = Samples([bytes(data), original], [(45, 70)] * 2)
    for channels in (3, 1):
        images, status = samples.decode(CROPS * 2, (21, 19), ids=[0, 0, 1, 1], channels=channels)
        again, status_again = samples.decode(CROPS * 2, (21, 19), ids=[0, 0, 1, 1], channels=channels)
        assert np.array_equal(images, again) and np.array_equal(status, status_again)
        assert not status[2:].any() and set(status.tolist()) <= {{0, 1, 2}}
        assert not images[status != 0].any()
        counts.append(int((status != 0).sum()))

counts = []
mutate()
assert sum(counts) > len(counts) // 2, "the mutations hardly damage anything"
print("survived", len(counts), sum(counts))
"""


def test_mutated_jpegs_never_crash_or_hang() -> None:
    """In a process of its own, so that a crash is seen. What decodes, decodes the same way twice."""
    code = FUZZ.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("survived")


# ------------------------------------------------------------------------------------------------- threads and memory
def test_threads_do_not_disturb_each_other() -> None:
    pictures = [photograph(index, 100 + 20 * index, 150) for index in range(6)]
    samples = samples_of(pictures, restart_marker_blocks=2)
    crops = random_crops(4, 0, np.arange(6), samples.sizes, 0.1, True)
    expected, _ = samples.decode(crops, (48, 48))
    wrong: list[int] = []

    def work(start: int) -> None:
        for turn in range(30):
            order = np.roll(np.arange(6), start + turn)[: 1 + turn % 6]
            images, status = samples.decode(crops[order], (48, 48), ids=order)
            if status.any() or not np.array_equal(images, expected[order]):
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_does_not_grow() -> None:
    """Over good and damaged samples; a handle that stays open would cost some ten kB each."""
    good = jpeg(photograph(1, 60, 60), restart_marker_blocks=1)
    samples = Samples([good, good[: len(good) // 2], b"\xff\xd8"], [(60, 60)] * 3)
    crops, ids = [[0, 0, 60, 60, 0]] * 300, np.arange(300) % 3

    def use() -> int:
        for _ in range(10):
            samples.decode(crops, (8, 8), ids=ids)
        return psutil.Process().memory_info().rss

    use()
    before = use()
    assert use() - before < 4 << 20
