"""Samples that do not decode, in whole runs: counted over all ranks, listed, and the end of the run if too many."""

import csv
from pathlib import Path

import pytest

from fasthpm.data.ffcv.beton import open_beton
from fasthpm.run.records import read_metrics
from tests.helpers.data_fixtures import image_folder, prepare
from tests.helpers.launch import check_ranks, run_ranks

RANKS = """
import sys
from pathlib import Path
import torch.distributed as dist
from fasthpm.run.bad_samples import BadSampleLog
from fasthpm.data import DatasetInfo, bad as limits
from fasthpm.data.bad import BadSample
from fasthpm.errors import UserError

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
limits.FEWEST = 3

class Loader:
    info = DatasetInfo(100, 3, (0.5,) * 3, (0.5,) * 3, ("a",))
    met = []
    def bad_samples(self):
        return list(self.met)

def bad(sample):
    return BadSample(sample, f"file{sample}, or so", "does not decode")

loader = Loader()
(folder / "bad_samples.csv").write_text("of another run")
log = BadSampleLog(folder, "x.beton", 0.001, rank=rank, keep=False)
dist.barrier()
assert log.update(loader) == 0
loader.met = [bad(7)] if rank else [bad(3), bad(7)]
counts = [log.update(loader), log.update(loader)]
assert counts == ([2, 2] if rank == 0 else [0, 0]), counts
dist.barrier()
log = BadSampleLog(folder, "x.beton", 0.001, rank=rank, keep=True)
loader.met = [] if rank else [bad(3)]
assert log.update(loader) == (2 if rank == 0 else 0)
loader.met = [bad(10), bad(11)] if rank else [bad(3)]
try:
    log.update(loader)
except UserError as error:
    text = str(error)
    assert error.printed_elsewhere == (rank != 0)
    assert "4 samples do not decode, max_bad_samples 0.001 allows 3 of the 100 in x.beton" in text, text
    assert f"all are listed in {folder / 'bad_samples.csv'}" in text and "file10" in text, text
    print(f"rank {rank} ended", flush=True)
dist.destroy_process_group()
"""


def test_ranks_count_and_list_distinct_bad_samples_together(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    output = check_ranks(script, tmp_path, launcher="forked")
    assert "rank 0 ended" in output
    assert "rank 1 ended" in output
    rows = list(csv.reader((tmp_path / "bad_samples.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["sample", "name", "why"]
    assert rows[1] == ["3", "file3, or so", "does not decode"]
    assert sorted(int(row[0]) for row in rows[1:]) == [3, 7, 10, 11]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of 24 images of which number 5 does not decode."""
    root = tmp_path_factory.mktemp("broken")
    out = prepare(image_folder(root / "folder", 24), root / "set.beton")
    table = open_beton(out)
    with out.open("r+b") as file:
        file.seek(int(table.positions[5]))
        file.write(bytes(int(table.lengths[5])))
    return out


RUN = (
    *("--recipe", "debug", "--deepspeed_config", "zero1_fp32", "--channels", 3),
    *("--epochs", 1, "--warmup_epochs", 0, "--log_every", 1, "--panel_every", 0),
)


def test_a_run_survives_a_bad_sample_and_says_so(broken: Path, tmp_path: Path) -> None:
    output = check_ranks(
        "fasthpm.pretrain",
        *RUN,
        "--data_path",
        broken,
        "--output_dir",
        tmp_path,
        launcher="forked",
        ranks=1,
        timeout=300,
    )
    assert output.count("set.beton, sample 5) does not decode; another sample takes its place") == 1
    assert f"bad samples  1 were replaced: {tmp_path / 'bad_samples.csv'}" in output
    assert read_metrics(tmp_path)[-1]["bad_samples"] == 1


def test_a_run_ends_where_no_bad_sample_is_allowed(broken: Path, tmp_path: Path) -> None:
    arguments = (*RUN, "--data_path", broken, "--output_dir", tmp_path, "--max_bad_samples", 0)
    finished = run_ranks("fasthpm.pretrain", *arguments, launcher="forked", ranks=1, timeout=300)
    assert finished.status == 2, finished.output
    assert "1 sample does not decode" in finished.output
    assert "Traceback" not in finished.output
