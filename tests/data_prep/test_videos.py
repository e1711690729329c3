"""Video files into prepared sets, and what is particular to the loaders of these; the contract is in test_loaders."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import ffmpeg as tools
from data_prep import moving_fashion, verify, videos
from data_prep.video_sources import open_videos as list_videos
from fasthpm.data import build_loader, read_info
from fasthpm.data.pixels import render
from fasthpm.data.sampling import sample_order
from fasthpm.data.video.prepared import copied_file, open_videos
from fasthpm.data.video.sampling import (
    POSITIONS,
    SCALES,
    clip_frames,
    clip_starts,
    multi_scale_crops,
    segment_frames,
    view_crops,
    view_segments,
    view_starts,
)
from fasthpm.errors import UserError
from tests.helpers.video_fixtures import FRAMES, ffmpeg, pattern, prepare_videos, video_folder

SIZE = (24, 24)
NO_CHANGE = np.ones(3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six videos of FRAMES frames in two sizes."""
    return video_folder(tmp_path_factory.mktemp("source") / "videos", 6)


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    return prepare_videos(source, tmp_path_factory.mktemp("prepared") / "set")


def loader_of(path, **options):
    values = {"batch_size": 6, "image_size": SIZE, "channels": 3, "seed": 5, "num_workers": 2, "num_frames": 3}
    return build_loader(path, **values | options)


def stored_frame(data, frame):
    """A stored frame through PIL: the slow truth."""
    return np.asarray(Image.open(io.BytesIO(data.jpeg(frame).tobytes())).convert("RGB"))


def rejected(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}


# ------------------------------------------------------------------------------------------------------- preparation
def decoded(path, height, width):
    """All frames of a video as ffmpeg shows them: uint8 [FRAMES, h, w, 3]."""
    command = ["ffmpeg", "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(FRAMES, height, width, 3)


def luma(pixels):
    """As JPEG stores it, without the chroma that it halves."""
    return np.asarray(Image.fromarray(pixels).convert("L")).astype(int)


def test_frames_are_those_that_ffmpeg_decodes(source, prepared):
    data = open_videos(prepared)
    assert len(data.videos) == 6
    for video, row in enumerate(data.videos):
        told = data.row(video)
        assert int(row["frames"]) == FRAMES == int(told["frames"])
        path, (height, width) = source / told["path"], (int(row["height"]), int(row["width"]))
        truth = decoded(path, height, width)
        for frame in range(FRAMES):
            shown = luma(stored_frame(data, int(row["first"]) + frame))
            differences = [np.abs(shown - luma(picture)).mean() for picture in truth]
            assert differences[frame] == min(differences) < 4
        assert told["fps"] == str(FRAMES)
        assert data.info.classes[int(row["label"])] == path.parent.name


def test_statistics_and_counts_are_of_all_pixels(source, prepared):
    data = open_videos(prepared)
    told = [(source / data.row(k)["path"], int(v["height"]), int(v["width"])) for k, v in enumerate(data.videos)]
    pixels = np.concatenate([decoded(*video).reshape(-1, 3) for video in told])
    assert np.abs(pixels.mean(0) / 255 - data.info.mean).max() < 0.005
    assert np.abs(pixels.std(0) / 255 - data.info.std).max() < 0.015  # other roundings of chroma
    assert data.sidecar["counts"] == [3, 3]
    assert read_info(prepared) == data.info


def test_the_same_bytes_for_any_number_of_processes_and_after_an_interruption(source, prepared, tmp_path, monkeypatch):
    again = prepare_videos(source, tmp_path / "one", "--num_workers", "1")
    stopping = iter([False, False, True])

    @contextlib.contextmanager
    def stops():
        yield lambda: next(stopping, True)

    monkeypatch.setattr("data_prep.pool.asked_to_stop", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare_videos(source, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    monkeypatch.undo()
    resumed = prepare_videos(source, tmp_path / "set")
    for name in ("frames.bin", "frames.npy", "videos.npy", "manifest.csv"):
        assert len({(path / name).read_bytes() for path in (prepared, again, resumed)}) == 1
    assert sorted(os.listdir(tmp_path)) == ["one", "set"]


def test_a_second_run_does_nothing_and_other_options_need_overwrite(source, tmp_path, capsys):
    out = prepare_videos(source, tmp_path / "set")
    written = (out / "info.json").stat().st_mtime_ns
    prepare_videos(source, out)
    assert "nothing to do" in capsys.readouterr().out
    assert (out / "info.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"output .*set exists, a prepared set; use --overwrite"):
        prepare_videos(source, out, "--jpeg_quality", "50")
    prepare_videos(source, out, "--jpeg_quality", "50", "--overwrite")
    assert json.loads((out / "info.json").read_text())["options"]["jpeg_quality"] == 50
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="a folder with other things"):
        prepare_videos(source, tmp_path / "mine", "--overwrite")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    """One file of every kind that a collection may have."""
    folder = tmp_path_factory.mktemp("odd") / "all"
    whole = pattern(folder / "whole.mp4", "-c:v", "libx264", "-movflags", "+faststart", seconds=2)
    (folder / "truncated.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    (folder / "zero.mp4").touch()
    (folder / "text.avi").write_text("no video at all")
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{whole}\n#EXT-X-ENDLIST\n")
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", folder / "sound.mp4")
    pattern(folder / "single.mp4", "-frames:v", "1", "-c:v", "libx264")
    Image.new("RGB", (64, 48)).save(folder / "picture.mp4", "JPEG")
    pattern(folder / "webm_called.avi", "-c:v", "libvpx", "-f", "webm")
    ffmpeg("-i", whole, "-c", "copy", "-metadata:s:v", "rotate=90", folder / "rotated.mp4")
    pattern(folder / "ten_bit.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p10le")
    pattern(folder / "interlaced.mp4", "-vf", "interlace", "-c:v", "libx264", "-flags", "+ilme+ildct", rate=20)
    pattern(folder / "odd.mp4", "-vf", "format=yuv444p,crop=51:37", "-c:v", "libx264")
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "testsrc2=s=64x48:r=10:d=2",
        "-vf",
        "select='lt(n,10)+not(mod(n,5))'",
        "-fps_mode",
        "vfr",
        "-c:v",
        "libx264",
        folder / "variable.mkv",
    )
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "testsrc2=s=64x48:r=10:d=1",
        "-f",
        "lavfi",
        "-i",
        "sine=d=3",
        "-c:v",
        "libx264",
        "-c:a",
        "aac",
        folder / "with_sound.mp4",
    )
    unknown = bytearray(pattern(folder / "unknown.avi", "-c:v", "mjpeg").read_bytes())
    (folder / "unknown.avi").write_bytes(bytes(unknown).replace(b"MJPG", b"QQQQ"))
    return folder


def test_odd_files_are_prepared_or_listed_with_the_reason(odd_files, tmp_path):
    out = prepare_videos(odd_files, tmp_path / "set", "--max_rejected", "20")
    reasons = rejected(out / "rejected.csv")
    assert set(reasons) == {
        "truncated.mp4",
        "zero.mp4",
        "text.avi",
        "playlist.mp4",
        "sound.mp4",
        "single.mp4",
        "picture.mp4",
        "unknown.avi",
    }
    assert "the file is empty" in reasons["zero.mp4"]
    assert "no video stream, only audio" in reasons["sound.mp4"]
    assert "1 frame to store" in reasons["single.mp4"]
    assert "it is an image" in reasons["picture.mp4"]
    assert "cannot decode its codec" in reasons["unknown.avi"]
    assert "ffprobe cannot read it" in reasons["text.avi"]
    data = open_videos(out)
    rows = {data.row(video)["path"]: data.videos[video] for video in range(len(data.videos))}
    assert {name: (int(row["height"]), int(row["width"])) for name, row in rows.items()} == {
        "whole.mp4": (48, 64),
        "rotated.mp4": (64, 48),
        "ten_bit.mp4": (48, 64),
        "interlaced.mp4": (48, 64),
        "odd.mp4": (36, 52),
        "variable.mkv": (48, 64),
        "with_sound.mp4": (48, 64),
        "webm_called.avi": (48, 64),
    }
    assert rows["whole.mp4"]["frames"] == 20
    assert rows["with_sound.mp4"]["frames"] == 10
    turned = np.rot90(stored_frame(data, int(rows["whole.mp4"]["first"])), axes=(1, 0)).astype(int)
    shown = stored_frame(data, int(rows["rotated.mp4"]["first"])).astype(int)
    assert min(np.abs(shown - turned).mean(), np.abs(shown - turned[::-1, ::-1]).mean()) < 8
    assert verify.main([str(out)]) is None


def test_a_variable_rate_becomes_constant(odd_files):
    """The later frames, shown for half a second each, are repeated; so time runs evenly over frame numbers."""
    for name, fits in (("variable.mkv", False), ("whole.mp4", True)):
        path = str(odd_files / name)
        assert tools.fits_nvdec(path, tools.probe(path)) == fits
    shown = list(tools.frames(str(odd_files / "variable.mkv"), (48, 64), Fraction(10)))
    truth = list(tools.frames(str(odd_files / "whole.mp4"), (48, 64), Fraction(10)))
    assert abs(len(shown) - 16) <= 1
    late = [np.abs(frame.astype(int) - truth[15]).mean() for frame in shown]
    assert late.index(min(late)) == 15
    assert np.abs(shown[12].astype(int) - shown[11]).mean() < 1


def test_too_many_unusable_files_are_an_error_and_nothing_is_read_twice(odd_files, tmp_path, capsys):
    some = tmp_path / "some"
    some.mkdir()
    for name in ("whole.mp4", "zero.mp4", "text.avi"):
        shutil.copy(odd_files / name, some)
    with pytest.raises(
        UserError, match=r"2 of 3 videos cannot be used, --max_rejected 0\.01 allows 0; .*rejected\.csv"
    ):
        prepare_videos(some, tmp_path / "set")
    assert len(rejected(tmp_path / "set.rejected.csv")) == 2
    assert not (tmp_path / "set").exists()
    prepare_videos(some, tmp_path / "set", "--max_rejected", "2")
    assert "going on after 3 of 3" in capsys.readouterr().out
    assert len(rejected(tmp_path / "set" / "rejected.csv")) == 2
    assert not (tmp_path / "set.rejected.csv").exists()


def test_short_side_stride_rate_and_limits(tmp_path):
    folder = tmp_path / "videos"
    pattern(folder / "a.mp4", size="96x64", seconds=2, rate=20)
    pattern(folder / "b.mp4", size="96x64", seconds=0.5, rate=20)
    out = tmp_path / "set"
    flags = ["--short_side", "32", "--frame_stride", "4", "--fps", "10", "--max_seconds", "1.5"]
    videos.main([str(folder), str(out), *flags, "--min_frames", "10", "--max_rejected", "1"])
    data = open_videos(out)
    assert [int(data.videos[name][0]) for name in ("frames", "height", "width")] == [4, 32, 48]
    assert "fewer than --min_frames 10" in rejected(out / "rejected.csv")["b.mp4"]
    assert data.row(0)["fps"] == "10"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frame_stride", "0"], "frame_stride is 0, expected 1"),
        (["--short_side", "4"], "short_side is 4"),
        (["--jpeg_quality", "101"], "jpeg_quality is 101"),
        (["--max_rejected", "-1"], "max_rejected -1 is negative"),
        (["--short_sid", "64"], "did you mean '--short_side'"),
    ],
)
def test_wrong_flags_are_one_line(source, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as error:
        videos.main([str(source), str(tmp_path / "out"), *flags])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_old_ffmpeg_is_one_line(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="ffmpeg is not on PATH; install it"):
        prepare_videos(source, tmp_path / "set")
    for tool in ("ffmpeg", "ffprobe"):
        (tmp_path / tool).write_text("#!/bin/sh\necho 'ffmpeg version 4.4.2-0ubuntu0 Copyright'\n")
        (tmp_path / tool).chmod(0o755)
    with pytest.raises(UserError, match=r"ffmpeg is version 4\.4\.2-0ubuntu0, expected 5\.1"):
        prepare_videos(source, tmp_path / "set")


# ------------------------------------------------------------------------------------------------------- sources
def test_lists_and_json_name_videos_and_labels(source, tmp_path):
    listed = tmp_path / "train.csv"
    listed.write_text("ant/000.mp4 3\nbee/001.mp4 0\n\nmissing file.mp4 1\n")
    files = list_videos(listed, source)
    assert (files.labels.tolist(), files.classes) == ([3, 0, 1], ("0", "1", "2", "3"))
    assert files.where(2) == str(source / "missing file.mp4")
    listed.write_text("ant/000.mp4,walk\nbee/001.mp4,run\n")
    files = list_videos(listed)
    assert (files.labels.tolist(), files.classes) == ([1, 0], ("run", "walk"))
    listed.write_text("only_a_path\n")
    with pytest.raises(UserError, match="line 1 is 'only_a_path', expected a path and a label"):
        list_videos(listed)
    entries = [{"id": "78", "template": "Holding [something]"}, {"id": "9", "template": "Dropping [something]"}]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    files = list_videos(tmp_path / "train.json")
    assert files.classes == ("Dropping something", "Holding something")
    (tmp_path / "labels.json").write_text(json.dumps({"Holding something": "0", "Dropping something": "1", "X": "2"}))
    files = list_videos(tmp_path / "train.json")
    assert (files.labels.tolist(), files.names) == ([0, 1], ["78.webm", "9.webm"])
    assert files.classes == ("Holding something", "Dropping something", "X")
    with pytest.raises(UserError, match=r"nowhere does not exist; expected a folder"):
        list_videos(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../secret.mp4", "ant/../../secret.mp4", "{root}/../secret.mp4", "/etc/passwd"])
def test_lists_cannot_leave_their_root(source, tmp_path, name):
    listed, name = tmp_path / "train.csv", name.format(root=source)
    listed.write_text(f"ant/000.mp4 0\n{name} 1\n")
    with pytest.raises(UserError, match=rf"train\.csv names '{re.escape(name)}', which lies outside .*--video_root"):
        list_videos(listed, source)
    listed.write_text(f"{source}/ant/000.mp4 0\nbee/../ant/001.mp4 0\n")
    assert len(list_videos(listed, source)) == 2
    (tmp_path / "train.json").write_text(json.dumps([{"id": "../9", "template": "Dropping [something]"}]))
    with pytest.raises(UserError, match=r"names '\.\./9\.webm', which lies outside"):
        list_videos(tmp_path / "train.json", source)


def test_bombs_are_refused_before_they_are_decoded(source, monkeypatch):
    path, size = str(source / "ant" / "000.mp4"), (48, 40)
    assert len(list(tools.frames(path, size, Fraction(10)))) == FRAMES
    monkeypatch.setattr(tools, "MAX_PIXELS", 40 * 48 - 1)
    with pytest.raises(ValueError, match="its pictures have more than 1919 pixels"):
        tools.probe(path)
    with pytest.raises(ValueError, match="exceeds specified max pixel count 1919"):  # after a harmless header
        list(tools.frames(path, size, Fraction(10)))


def test_files_that_a_list_names_and_that_are_missing_are_counted_and_listed(source, tmp_path):
    (tmp_path / "train.csv").write_text("ant/000.mp4 0\nbee/nothing.mp4 1\n")
    out = prepare_videos(tmp_path / "train.csv", tmp_path / "set", "--video_root", str(source), "--max_rejected", "1")
    assert "the file is not there" in rejected(out / "rejected.csv")["nothing.mp4"]
    assert json.loads((out / "info.json").read_text())["num_rejected"] == 1


# ------------------------------------------------------------------------------------------------------- sampling
def test_clips_begin_anywhere_and_short_videos_are_looped():
    ids, frames = np.arange(20_000), np.full(20_000, 10)
    starts = clip_starts(1, 0, ids, frames, 7)
    counts = Counter(starts.tolist())
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 4700
    assert clip_frames(np.array([8, 0]), np.array([10, 3]), 4, 2).tolist() == [[8, 0, 2, 4], [0, 2, 1, 0]]
    assert set(clip_starts(1, 0, ids, np.full(20_000, 4), 7).tolist()) == {0, 1, 2, 3}
    assert view_starts(np.array([10, 10, 4]), 4, np.array([0, 1, 1]), 2).tolist() == [0, 6, 0]
    assert view_starts(np.array([10]), 4, np.array([0]), 1).tolist() == [3]


def test_segments_are_videomaes():
    """A frame drawn in each of T stretches, shorter videos too; in tests of two clips, their starts and middles."""
    ids, lengths = np.arange(2000), np.tile([20, 16, 6, 1], 500)
    drawn = segment_frames(1, 0, ids, lengths, 8)
    for row, length in zip(drawn.tolist(), lengths.tolist(), strict=True):
        for k, frame in enumerate(row):
            assert int(k * length / 8) <= frame <= min((k + 1) * length / 8, length - 1)
    assert {frame for row in drawn[lengths == 16].tolist() for frame in row} == set(range(16))
    assert not np.array_equal(drawn, segment_frames(1, 1, ids, lengths, 8))
    for number, shift in ((0, 0.0), (1, 0.5)):
        want = [int((k + shift) * 20 / 8) for k in range(8)]
        assert view_segments(np.array([20]), 8, np.array([number]), 2).tolist() == [want]
    assert view_segments(np.array([20]), 8, np.array([0]), 1).tolist() == [want]


def test_multi_scale_crops_are_videomaes():
    """Against the rule one video at a time: sides of the four scales, at most one step apart, at the 13 places."""
    sizes = np.tile([[240, 320]], (4000, 1))
    crops = multi_scale_crops(0, 3, np.arange(4000), sizes, (224, 224), True)
    sides = [int(240 * scale) for scale in SCALES]
    pairs = {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
    assert {(int(h), int(w)) for _, _, h, w, _ in crops} == pairs
    places = {tuple(place) for place in POSITIONS.tolist()}
    assert len(places) == 13
    for top, left, height, width, _ in crops.tolist():
        down, right = (240 - height) // 4, (320 - width) // 4
        assert (top // down if down else 0, left // right) in {(y if down else 0, x) for y, x in places}
    assert 0.45 < crops[:, 4].mean() < 0.55
    snapped = multi_scale_crops(0, 0, np.arange(200), np.tile([[226, 300]], (200, 1)), (224, 224), False)
    assert set(snapped[:, 2].tolist()) == {224, int(226 * 0.875), int(226 * 0.75), int(226 * 0.66)}
    assert not snapped[:, 4].any()
    small = multi_scale_crops(0, 0, np.arange(200), np.tile([[223, 300]], (200, 1)), (224, 224), False)
    assert small[:, 2].max() == 223
    assert view_crops(np.array([[240, 320]] * 3), (224, 224), np.arange(3), 3)[:, :4].tolist() == [
        [0, 0, 240, 240],
        [0, 40, 240, 240],
        [0, 80, 240, 240],
    ]


# ------------------------------------------------------------------------------------------------------- loaders
@pytest.mark.parametrize("decoder", ["turbojpeg", "dali"])
def test_pixels_and_frames_agree_with_pil(prepared, decoder):
    """Every clip is the stored frames from one drawn start on, each cut, resized and flipped alike."""
    data, loader = open_videos(prepared), loader_of(prepared, decoder=decoder, sampling_rate=2)
    flips, starts = set(), set()
    for epoch in range(4):
        loader.set_epoch(epoch)
        (batch,) = loader
        assert batch.ids.tolist() == sample_order(5, epoch, 6).tolist()
        for clip, video, crop in zip(batch.images.numpy(), batch.ids.tolist(), batch.crops.numpy(), strict=True):
            row = data.videos[video]
            first = int(clip_starts(5, epoch, np.array([video]), np.array([FRAMES]), 5)[0])
            starts.add(first)
            flips.add(int(crop[4]))
            for t, pixels in enumerate(clip):
                truth = render(stored_frame(data, int(row["first"]) + first + 2 * t), crop, SIZE, "bicubic", NO_CHANGE)
                difference = np.abs(pixels.astype(int) - truth)
                assert difference.mean() < 1.5
                assert np.quantile(difference, 0.99) <= 20
    loader.close()
    assert len(starts) > 3
    assert flips == {0, 1}
    unflipped = loader_of(prepared, decoder=decoder, flip=False)
    assert not next(iter(unflipped)).crops[:, 4].any()
    unflipped.close()


def test_views_are_rows_one_after_the_other(prepared):
    data = open_videos(prepared)
    loader = loader_of(prepared, train=False, views=(2, 3), batch_size=4, num_frames=4)
    batches = list(loader)
    loader.close()
    ids = torch.cat([batch.ids for batch in batches])
    assert ids.tolist() == [video for video in range(6) for _ in range(6)]
    assert batches[0].images.shape == (24, 4, *SIZE, 3)
    row, views = data.videos[0], batches[0].images[:6].numpy()
    for number, clip in enumerate(views):
        start, crop = (0, FRAMES - 4)[number // 3], batches[0].crops[number].numpy()
        for t in range(4):
            truth = render(stored_frame(data, int(row["first"]) + start + t), crop, SIZE, "bicubic", NO_CHANGE)
            assert np.abs(clip[t].astype(int) - truth).mean() < 1.5
    middle = loader_of(prepared, train=False, views=(1, 3), decoder="dali", num_frames=4)
    assert next(iter(middle)).crops[:3].tolist() == batches[0].crops[:3].tolist()
    middle.close()


def test_segments_reach_the_clip(prepared):
    """The whole video in a clip, in training and in tests, from a set whose stride sampling_rate does not fit."""
    data, options = open_videos(prepared), {"frame_sampling": "segments", "num_frames": 4, "crop": "random_resized"}
    for train in (True, False):
        loader = loader_of(prepared, train=train, **options)
        batch = next(iter(loader))
        loader.close()
        video, crop, lengths = int(batch.ids[0]), batch.crops[0].numpy(), np.array([FRAMES])
        drawn = segment_frames(5, 0, batch.ids[:1].numpy(), lengths, 4)
        chosen = drawn if train else view_segments(lengths, 4, np.array([0]), 1)
        for pixels, frame in zip(batch.images[0].numpy(), chosen[0].tolist(), strict=True):
            truth = render(
                stored_frame(data, int(data.videos[video]["first"]) + frame), crop, SIZE, "bicubic", NO_CHANGE
            )
            assert np.abs(pixels.astype(int) - truth).mean() < 1.5


def test_training_views_are_draws_of_their_own(prepared):
    twice, once = loader_of(prepared, views=(2, 1)), loader_of(prepared)
    (two,), (one,) = twice, once
    assert two.ids.tolist() == np.repeat(one.ids, 2).tolist()
    assert torch.equal(two.images[::2], one.images)
    assert not torch.equal(two.crops[::2], two.crops[1::2])
    resized = next(iter(loader_of(prepared, crop="random_resized", crop_min=0.1)))
    areas = resized.crops[:, 2] * resized.crops[:, 3]
    assert not torch.equal(areas, one.crops[:, 2] * one.crops[:, 3])


def test_one_frame_makes_images(prepared):
    loader = loader_of(prepared, num_frames=1, sampling_rate=1)
    assert next(iter(loader)).images.shape == (6, *SIZE, 3)
    loader.close()


def test_grey_videos_have_one_channel(tmp_path):
    pattern(tmp_path / "videos" / "a.mp4", "-vf", "format=gray,format=yuv420p", "-c:v", "libx264")
    out = prepare_videos(tmp_path / "videos", tmp_path / "set")
    assert read_info(out).channels == 1
    both = [loader_of(out, channels=1, batch_size=1, decoder=decoder) for decoder in ("turbojpeg", "dali")]
    ours, theirs = (next(iter(loader)).images for loader in both)
    assert ours.shape == (1, 3, *SIZE, 1)
    assert (ours.float() - theirs.float()).abs().mean() < 1
    for loader in both:
        loader.close()


@pytest.mark.parametrize("decoder", ["turbojpeg", "dali"])
def test_clips_with_damaged_frames_are_replaced_and_named(prepared, tmp_path, decoder):
    broken = damaged(prepared, tmp_path / "set", videos=(2,))
    loader = loader_of(broken, decoder=decoder, num_frames=FRAMES)
    (batch,) = loader
    (bad,) = loader.bad_samples()
    loader.close()
    assert bad.sample == 2
    assert open_videos(prepared).row(2)["path"] in bad.name
    assert int(batch.replaced.sum()) == 1
    assert 2 not in batch.ids
    again = loader_of(broken, decoder="turbojpeg", num_frames=FRAMES)
    assert next(iter(again)).ids.tolist() == batch.ids.tolist()
    again.close()
    with pytest.raises(UserError, match=r"video 2\) has frames that do not decode"):
        list(loader_of(broken, decoder=decoder, num_frames=FRAMES, train=False))


def damaged(prepared, target, videos):
    """A copy of the set in which these videos' frames are zeros."""
    shutil.copytree(prepared, target)
    data = open_videos(target)
    with (target / "frames.bin").open("r+b") as file:
        for video in videos:
            first, count = int(data.videos[video]["first"]), int(data.videos[video]["frames"])
            start, end = int(data.positions[first]), int(data.positions[first + count])
            file.seek(start)
            file.write(bytes(end - start))
    return target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "nvdec"}, "decoder is nvdec, expected one of auto, turbojpeg, dali"),
        ({"crop": "corner"}, "crop is corner, expected one of auto, multi_scale"),
        ({"views": (2, 3)}, r"views is \(2, 3\), expected clips and crops"),
        ({"decoder": "dali", "interpolation": "area"}, "resizes bicubic and changes no colours; interpolation is area"),
        ({"channels": 1}, "has 3 channels, not 1; use --channels 3"),
    ],
)
def test_wrong_options_are_one_line(prepared, options, message):
    with pytest.raises(UserError, match=message) as error:
        loader_of(prepared, **options)
    assert "\n" not in str(error.value)


def test_sampling_rates_that_the_set_does_not_hold_are_refused(source, tmp_path):
    out = tmp_path / "set"
    videos.main([str(source), str(out), "--num_workers", "2"])
    with pytest.raises(UserError, match=r"sampling_rate is 3, but .* holds every 2th frame; use a multiple of 2"):
        loader_of(out, sampling_rate=3)
    loader = loader_of(out, sampling_rate=4)
    assert next(iter(loader)).images.shape == (6, 3, *SIZE, 3)
    loader.close()


def test_clips_of_images_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="holds no prepared videos; use --num_frames 1 for images"):
        build_loader(tmp_path, batch_size=1, image_size=(8, 8), channels=3, num_frames=4)


def test_a_missing_dali_is_one_line(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    with pytest.raises(UserError, match=r"needs nvidia-dali-cuda130 .* pip install 'fasthpm\[video\]'"):
        loader_of(prepared, decoder="dali")
    assert loader_of(prepared).info.num_samples == 6


# ------------------------------------------------------------------------------------------------------- video files
@pytest.fixture(scope="module")
def with_copies(tmp_path_factory):
    """A set with --copy: VP9, which DALI decodes on a CPU too, kept; and one that is rotated, hence encoded anew."""
    root = tmp_path_factory.mktemp("copies")
    for number in range(2):
        pattern(root / "vp9" / f"{number}.webm", "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")
    kept = prepare_videos(root / "vp9", root / "kept", "--copy")
    whole = pattern(root / "mixed" / "0.mp4")
    ffmpeg("-i", whole, "-c", "copy", "-metadata:s:v", "rotate=90", root / "mixed" / "1.mp4")
    return kept, prepare_videos(root / "mixed", root / "encoded", "--copy"), root


def test_copies_are_originals_where_a_gpu_decodes_them(with_copies):
    kept, encoded, root = with_copies
    data = open_videos(kept)
    for video in range(2):
        assert copied_file(data, video).read_bytes() == (root / "vp9" / data.row(video)["path"]).read_bytes()
    data = open_videos(encoded)
    by_name = {data.row(video)["path"]: copied_file(data, video) for video in range(2)}
    assert by_name["0.mp4"].read_bytes() == (root / "mixed" / "0.mp4").read_bytes()
    upright = tools.probe(str(by_name["1.mp4"]))
    assert (upright.height, upright.width, upright.codec, upright.plain) == (64, 48, "h264", True)
    assert verify.main([str(kept)]) is None


def test_dalis_video_decoder_gives_the_same_clips(with_copies):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the test with NVDEC takes this one's place")
    kept, encoded, _ = with_copies
    video, jpeg = loader_of(kept, decoder="dali_video", batch_size=2), loader_of(kept, batch_size=2)
    for a, b in zip(video, jpeg, strict=True):
        assert torch.equal(a.crops, b.crops)
        assert (a.images.float() - b.images.float()).abs().mean() < 8  # other chroma and JPEG of quality 90
        shuffled = (a.images.float() - b.images.flip(1).float()).abs().mean()
        assert (a.images.float() - b.images.float()).abs().mean() < shuffled
    video.close()
    jpeg.close()
    with pytest.raises(
        UserError, match=r"is h264, and DALI's CPU decoder takes mjpeg, vp8, vp9 only; use decoder dali"
    ):
        list(loader_of(encoded, decoder="dali_video", batch_size=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nvJPEG and NVDEC need a GPU")
@pytest.mark.parametrize("decoder", ["dali_gpu", "dali_video"])
def test_gpu_decoders_give_the_same_clips_on_the_gpu(with_copies, decoder):
    _, encoded, _ = with_copies
    on_gpu, on_cpu = loader_of(encoded, decoder=decoder, batch_size=2), loader_of(encoded, batch_size=2)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.images.is_cuda
        assert (a.images.cpu().float() - b.images.float()).abs().mean() < 8
    on_gpu.close()
    on_cpu.close()


def test_gpu_pipelines_are_refused_without_a_gpu_and_defined_for_one(prepared, with_copies, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the test above runs these pipelines")
    from nvidia.dali.pipeline import Pipeline

    with pytest.raises(UserError, match="decoder dali_gpu needs a GPU, but torch sees none"):
        loader_of(prepared, decoder="dali_gpu")
    with pytest.raises(UserError, match="no video file in the set; prepare it again with --copy"):
        loader_of(prepared, decoder="dali_video")
    for kind, decoder in (("prepared", "dali"), ("copies", "dali_video")):
        loader = loader_of(prepared if kind == "prepared" else with_copies[0], decoder=decoder, batch_size=2)
        for gpu, device in ((False, "cpu"), (True, "gpu")):
            monkeypatch.setattr(loader, "gpu", gpu)
            with Pipeline(2, 1, 0):
                assert loader._outputs().device == device
            assert loader._define(0).max_batch_size == 2 * (3 if decoder == "dali" else 1)
        loader.close()


def test_paths_that_leave_the_set_are_refused(with_copies, tmp_path):
    shutil.copytree(with_copies[0], tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("videos/00000000.webm", "../../etc/passwd"))
    with pytest.raises(UserError, match=r"names '\.\./\.\./etc/passwd', which lies outside the set"):
        list(loader_of(tmp_path / "set", decoder="dali_video", batch_size=2))
    manifest.write_text(manifest.read_text().replace("../../etc/passwd", "videos/gone.webm"))
    with pytest.raises(UserError, match=r"gone\.webm is not there, but .*manifest\.csv names it"):
        list(loader_of(tmp_path / "set", decoder="dali_video", batch_size=2))


# ------------------------------------------------------------------------------------------------------- damaged sets
def break_info(path, **values):
    info = json.loads((path / "info.json").read_text())
    (path / "info.json").write_text(json.dumps(info | values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "info.json").write_text("{"), "info.json cannot be read"),
        (lambda p: break_info(p, mean=None), "no list named 'mean'"),
        (lambda p: break_info(p, layout=99), "is of format fasthpm-videos, 99"),
        (lambda p: os.truncate(p / "frames.bin", 100), "frames.bin has 100 bytes, info.json says"),
        (lambda p: (p / "frames.bin").unlink(), "frames.bin is not there"),
        (lambda p: (p / "videos.npy").write_bytes(b"no table"), "videos.npy cannot be read"),
        (lambda p: np.save(p / "videos.npy", np.zeros(3)), "videos.npy holds float64"),
        (lambda p: break_info(p, num_samples=5), "do not fit info.json"),
    ],
)
def test_damaged_sets_are_refused(prepared, tmp_path, spoil, message):
    shutil.copytree(prepared, tmp_path / "set")
    spoil(tmp_path / "set")
    with pytest.raises(UserError, match=message) as error:
        loader_of(tmp_path / "set")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        read_info(tmp_path / "set")


def test_verify_finds_what_opening_does_not(prepared, tmp_path, capsys):
    verify.main([str(prepared)])
    assert "is sound: 6 videos, 60 frames, 2 classes, 3 channels" in capsys.readouterr().out
    broken = damaged(prepared, tmp_path / "set", videos=(1,))
    with pytest.raises(UserError, match=r"frames\.bin has another sha256"):
        verify.main([str(broken)])
    info = json.loads((broken / "info.json").read_text())
    info["sha256"].pop("frames.bin")
    (broken / "info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"video 1\): frame 0 does not decode"):
        verify.main([str(broken)])
    (broken / "manifest.csv").write_text("path\n")
    info["sha256"].pop("manifest.csv")
    (broken / "info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"manifest\.csv has 1 lines, expected 7"):
        verify.main([str(broken)])


# ------------------------------------------------------------------------------------------------------- the demo set
def test_moving_garments_show_their_class_by_motion_alone(tmp_path, capsys):
    flags = ["--train", "8", "--val", "4", "--size", "32", "--num_frames", "6", "--num_workers", "2", "--speeds", "2"]
    moving_fashion.main([str(tmp_path), *flags])
    data = open_videos(tmp_path / "train")
    assert (len(data.videos), data.info.channels, len(data.info.classes)) == (8, 1, 4)
    assert data.sidecar["counts"] == [2] * 4
    for video, row in enumerate(data.videos):
        frames = [stored_frame(data, int(row["first"]) + k)[..., 0].astype(float) for k in range(6)]
        motion = moving_fashion.velocity(data.info.classes[int(row["label"])])
        told = np.abs(np.roll(frames[0], [5 * step for step in motion], (0, 1)) - frames[5]).mean()
        others = [moving_fashion.velocity(name) for name in data.info.classes]
        found = min(others, key=lambda m: np.abs(np.roll(frames[0], (5 * m[0], 5 * m[1]), (0, 1)) - frames[5]).mean())
        assert found == motion
        assert told < 8, video
    moving_fashion.main([str(tmp_path), *flags])
    assert "nothing to do" in capsys.readouterr().out


def test_where_garments_begin_says_nothing_about_the_class():
    """So frames of all classes are alike: the sum over a batch of clips does not depend on the motion."""
    garment = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    for name in moving_fashion.class_names(8, [1, 3]):
        clip = moving_fashion.draw_clip(garment, (5, 7), moving_fashion.velocity(name), 4, 40)
        assert (clip.sum((1, 2)) == clip[0].sum()).all()
        assert np.array_equal(np.roll(clip[0], moving_fashion.velocity(name), (0, 1)), clip[1])
