"""Prepared sets with a few bytes changed: nothing may crash, hang or pass unnoticed.

The mutations are drawn by hypothesis; a child process, which a crash would end, opens, reads and verifies them.
"""

import json
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fasthpm.data.ffcv.beton import DESCRIPTOR, HEADER, ROW, open_beton
from tests.helpers.data_fixtures import image_folder, prepare
from tests.helpers.launch import ROOT

CASES, SECONDS = 60, 60  # mutations per region, and for how long one of them may take
CHILD = """
import contextlib, io, json, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from data_prep import verify
from fasthpm.data import build_loader
from fasthpm.errors import UserError

def attempt(action):
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            action()
    except UserError as error:
        return str(error)
    return ""

def read(path):
    loader = build_loader(path, batch_size=4, image_size=(16, 16), channels=3, train=False, num_workers=1)
    try:
        if any(batch.replaced.any() for batch in loader if hasattr(batch, "replaced")):
            raise UserError("samples were replaced")
    finally:
        loader.close()

for line in sys.stdin:
    path = Path(json.loads(line))
    answer = [attempt(lambda: read(path)), attempt(lambda: verify.verify(path, 1))]
    print(json.dumps(answer), flush=True)
"""


class Reader:
    """The child, started again if it should have ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def __call__(self, path: Path) -> tuple[str, str]:
        """What reading and verifying a set reported, "" for nothing."""
        if self.process is None:
            code = CHILD.format(root=str(ROOT))
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        self.process.stdin.write(json.dumps(str(path)) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        assert ready, f"no answer within {SECONDS} s"
        answer = self.process.stdout.readline()
        if not answer:
            status, process, self.process = self.process.wait(), self.process, None
            pytest.fail(f"the process ended with {status}: {process.stderr.read()[-2000:]}")
        return tuple(json.loads(answer))

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    child = Reader()
    yield child
    child.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of JPEG and raw images."""
    folder = tmp_path_factory.mktemp("fuzz")
    source = image_folder(folder / "in", 10, sizes=((40, 48), (24, 30)))
    return prepare(source, folder / "a.beton", "--write_mode", "proportion")


def regions(path: Path) -> dict[str, list[range]]:
    """Which bytes of the file are what."""
    beton = open_beton(path)
    rows_at = HEADER.itemsize + 2 * DESCRIPTOR.itemsize
    table = int(path.read_bytes()[16:24][::-1].hex(), 16)
    spans = zip(beton.positions.tolist(), beton.lengths.tolist(), strict=True)
    return {
        "header": [range(rows_at)],
        "rows": [range(rows_at, rows_at + len(beton.modes) * ROW.itemsize)],
        "pixels": [range(start, start + length) for start, length in spans],
        "table": [range(table, path.stat().st_size)],
        "padding": [range(rows_at + len(beton.modes) * ROW.itemsize, int(beton.positions.min()))],
    }


def layout(path: Path) -> list[object]:
    """What the loader takes from the tables and can check: not labels."""
    beton = open_beton(path)
    sizes = beton.heights.astype(np.int64) * 65536 + beton.widths
    columns = (beton.positions, beton.lengths, beton.modes, sizes)
    return [beton.info, *(column.tolist() for column in columns)]


@st.composite
def mutations(draw: st.DrawFn, places: list[range], size: int) -> list[tuple[int, int]]:
    """A few (position, bits to flip), or a run of bytes."""
    where = st.sampled_from(places).flatmap(lambda place: st.integers(place.start, place.stop - 1))
    flips = draw(
        st.lists(st.tuples(where, st.integers(1, 255)), min_size=1, max_size=4, unique_by=lambda flip: flip[0])
    )
    if draw(st.booleans()):
        start, length = flips[0][0], draw(st.integers(1, 64))
        return [(position, flips[0][1]) for position in range(start, min(start + length, size))]
    return flips


@pytest.mark.parametrize("region", ["header", "rows", "pixels", "table", "padding"])
def test_no_change_crashes_hangs_or_passes_unnoticed(
    original: Path, reader: Reader, tmp_path: Path, region: str
) -> None:
    data, places = original.read_bytes(), regions(original)[region]
    path = tmp_path / "a.beton"
    shutil.copy(original.with_suffix(".json"), tmp_path)
    path.write_bytes(data)
    assert reader(path) == ("", "")

    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(places, len(data)))
    def check(flips: list[tuple[int, int]]) -> None:
        changed = bytearray(data)
        for position, bits in flips:
            changed[position] ^= bits
        path.write_bytes(changed)
        read, verified = reader(path)
        assert verified
        assert "\n" not in read + verified
        assert read or region == "pixels" or layout(path) == layout(original)

    check()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("sidecar_agrees", [False, True])
def test_a_cut_file_is_refused(
    original: Path, reader: Reader, tmp_path: Path, share: float, sidecar_agrees: bool
) -> None:
    data = original.read_bytes()[: int(original.stat().st_size * share)]
    (tmp_path / "a.beton").write_bytes(data)
    sidecar = json.loads(original.with_suffix(".json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(sidecar | ({"bytes": len(data)} if sidecar_agrees else {})))
    assert all(reader(tmp_path / "a.beton"))


@settings(max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_sidecars_of_any_content_are_one_line(
    original: Path, reader: Reader, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("sidecar", numbered=True)
    values = json.loads(original.with_suffix(".json").read_text())
    name = data.draw(
        st.sampled_from(["num_samples", "channels", "mean", "std", "classes", "bytes", "sha256", "format"])
    )
    junk = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers(0, 9), max_size=4))
    value = data.draw(junk)
    shutil.copy(original, folder / "a.beton")
    (folder / "a.json").write_text(json.dumps(values | {name: value}))
    for words in reader(folder / "a.beton"):
        assert "\n" not in words
    shutil.rmtree(folder)
