"""What ffmpeg is asked to do with other people's files."""

import errno
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_prep import ffmpeg as tools
from tests.helpers.disk import fill, mounted
from tests.helpers.video_fixtures import FRAMES, ffmpeg, pattern


def test_bombs_are_refused_before_they_are_decoded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, size = str(source / "ant" / "000.mp4"), (48, 40)
    assert len(list(tools.frames(path, size, Fraction(10)))) == FRAMES
    monkeypatch.setattr(tools, "MAX_PIXELS", 40 * 48 - 1)
    with pytest.raises(ValueError, match="its pictures have more than 1919 pixels"):
        tools.probe(path)
    with pytest.raises(ValueError, match="exceeds specified max pixel count 1919"):  # after a harmless header
        list(tools.frames(path, size, Fraction(10)))


# ------------------------------------------------------------------------------------------------------- odd files
def decode(path: Path) -> tuple[list[np.ndarray], tools.Stream]:
    """All frames at the file's own rate, treated as it needs."""
    stream = tools.probe(str(path))
    size, treatment, tried = (stream.height, stream.width), tools.USUAL, 0
    while (tried := tried + 1) < 4:
        pictures = tools.frames(str(path), size, stream.fps, stream=stream, treatment=treatment)
        try:
            return list(pictures), stream
        except tools.Otherwise as needed:
            treatment = needed.treatment
    raise AssertionError(treatment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


def joined(folder: Path, name: str, *parts: Path) -> Path:
    listed = folder / f"{name}.list"
    listed.write_text("".join(f"file '{part}'\n" for part in parts))
    ffmpeg("-f", "concat", "-safe", "0", "-i", listed, "-c", "copy", folder / name)
    return folder / name


def test_pictures_of_another_size_keep_their_places_and_their_shape(folder: Path) -> None:
    """Fitted into the first one's size: larger ones shrunk, turned ones between black borders."""
    coding = ("-c:v", "libvpx", "-b:v", "1M", "-deadline", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p")
    small = pattern(folder / "small.webm", *coding)
    large = pattern(folder / "large.webm", "-vf", "scale=128:96", *coding)
    turned = folder / "turned_part.webm"
    ffmpeg("-f", "lavfi", "-i", "color=white:s=48x64:r=10:d=1", *coding, turned)
    shown, stream = decode(joined(folder, "grows.webm", small, large, small))
    assert (len(shown), stream.fps) == (30, 10)
    for frame in range(10):
        for other in (10, 20):
            assert np.abs(shown[frame].astype(int) - shown[other + frame]).mean() < 25
    assert np.abs(shown[0].astype(int) - shown[20]).mean() < 2
    shown, _ = decode(joined(folder, "turns.webm", small, turned, small))
    assert len(shown) == 30
    middle = shown[15].mean(2)  # 36 x 48 in 48 x 64: a column of white
    white = np.flatnonzero(middle[24] > 200)
    assert (white.min(), white.max()) == (pytest.approx(14, abs=1), pytest.approx(49, abs=1))
    assert middle[:, :12].max() < 30
    assert middle[:, 24:40].min() > 200


@pytest.mark.parametrize(
    ("coding", "ending"),
    [
        (("-c:v", "mpeg4", "-q:v", "3"), "avi"),
        (("-c:v", "libx264", "-pix_fmt", "yuv420p", "-sc_threshold", "0"), "avi"),
        (("-c:v", "libx264", "-pix_fmt", "yuv420p", "-sc_threshold", "0"), "ts"),
        (("-c:v", "mpeg2video", "-q:v", "3"), "ts"),
        (("-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params", "log-level=none:open-gop=0:scenecut=0"), "ts"),
    ],
)
def test_a_file_that_begins_within_a_group_of_pictures_is_stored_from_its_first_key_frame_on(
    folder: Path, coding: tuple[str, ...], ending: str
) -> None:
    whole = pattern(folder / f"{coding[1]}.{ending}", *coding, "-g", "10", seconds=3)
    begun = folder / f"{coding[1]}_begun.{ending}"
    if ending == "avi":
        ffmpeg("-i", whole, "-c", "copy", "-bsf:v", "noise=drop='lt(n,4)'", begun)
    else:
        data = whole.read_bytes()
        begun.write_bytes(data[len(data) // 8 // 188 * 188 :])
    truth, shown = decode(whole)[0], decode(begun)[0]
    assert len(truth) == 30
    assert len(shown) == 20
    assert all(np.array_equal(a, b) for a, b in zip(shown, truth[10:], strict=True))


def test_damage_within_a_file_is_still_refused(folder: Path) -> None:
    whole = pattern(folder / "sound.avi", "-c:v", "mpeg4", "-q:v", "3", "-g", "10", seconds=3)
    data = bytearray(whole.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 400, 40):
        data[place] ^= 0xFF
    (folder / "bad.avi").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="ffmpeg: "):
        decode(folder / "bad.avi")


def test_late_pictures_and_their_copy_begin_with_the_first(folder: Path, tmp_path: Path) -> None:
    """Sound that begins before the picture: no picture is repeated for it, neither stored nor in the copy."""
    coding = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac", "-shortest")
    both = folder / "both.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=2", "-f", "lavfi", "-i", "sine=d=2", *coding, both)
    for name in ("late.mkv", "late.mp4"):
        path = folder / name
        ffmpeg("-itsoffset", "0.4", "-i", both, "-i", both, "-map", "0:v", "-map", "1:a", "-c", "copy", path)
        shown, stream = decode(path)
        assert (len(shown), stream.seconds) == (20, pytest.approx(2, abs=0.06))
        copy = tmp_path / f"{name}.mp4"
        tools.encode_h264(str(path), copy, (48, 64), stream.fps, 120.0, 0.0, stream=stream)
        pictures, count = tools.pick_frames(copy, range(20), (48, 64))
        assert count == 20
        for frame, picture in enumerate(pictures):
            far = [np.abs(picture.astype(int) - other).mean() for other in shown]
            assert far[frame] < min(far) + 0.2
        few = list(tools.frames(str(path), (48, 64), stream.fps, seconds=1.0))
        assert len(few) == 10


@pytest.mark.parametrize(("matrix", "range_"), [("bt709", "tv"), ("bt709", "pc"), ("smpte170m", "pc")])
def test_copies_have_the_colours_that_dali_reads(folder: Path, tmp_path: Path, matrix: str, range_: str) -> None:
    path = folder / f"{matrix}{range_}.mp4"
    colours = f"scale=out_color_matrix={matrix}:out_range={range_},format=yuv420p"
    coding = ("-c:v", "libx264", "-colorspace", matrix, "-color_range", range_)
    ffmpeg("-f", "lavfi", "-i", "color=0x1ec81e:s=64x48:r=10:d=1", "-vf", colours, *coding, path)
    stream = tools.probe(str(path))
    assert not tools.fits_nvdec(str(path), stream)
    tools.encode_h264(str(path), tmp_path / "a.mp4", (48, 64), stream.fps, 0.0, 0.0, stream=stream)
    (picture,), _ = tools.pick_frames(tmp_path / "a.mp4", [5], (48, 64))
    assert np.abs(picture.reshape(-1, 3).mean(0) - (30, 200, 30)).max() < 6


def test_a_disk_that_takes_no_more_is_not_the_videos_fault(source: Path, tmp_path: Path) -> None:
    path = str(source / "ant" / "000.mp4")
    with mounted(tmp_path / "disk", 1) as disk:
        fill(disk)
        with pytest.raises(OSError, match="No space left on device") as error:
            tools.encode_h264(path, disk / "a.mp4", (40, 48), Fraction(10), 0.0, 0.0)
        assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="Read-only file system"):
        tools._blame_the_disk(tmp_path, "ffmpeg: file:x: Read-only file system")
    tools._blame_the_disk(tmp_path, "ffmpeg: ac-tex damaged")
    assert not [name for name in tmp_path.iterdir() if name.name != "disk"]
