"""What the benches share: processor time, ratios, a choice of photographs."""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from bench import common
from fasthpm.errors import UserError
from tests.helpers.launch import ROOT


def test_processor_time_counts_children_alive_and_ended() -> None:
    burn = "import time\nwhile time.process_time() < {}: pass\n{}"
    begin = common.cpu_seconds()
    subprocess.run([sys.executable, "-c", burn.format(0.3, "")], check=True)
    ended = common.cpu_seconds() - begin
    assert 0.3 <= ended < 1.5
    command = [sys.executable, "-c", burn.format(0.5, "print(flush=True)\ntime.sleep(100)")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        alive = common.cpu_seconds() - begin - ended
        process.kill()
    assert 0.4 <= alive < 2


def test_ratios_are_taken_round_by_round() -> None:
    assert common.ratios([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert common.show({"median": 2.0, "low": 1.0, "high": 3.456}) == "2.00 (1.00 to 3.46)"


def test_chosen_photographs_are_spread_over_the_folder(photographs: Path, tmp_path: Path) -> None:
    folder = common.choose_photos(photographs, tmp_path, 6)
    assert len(common.files_in(folder)) == 6
    assert len(list(folder.iterdir())) == 2
    assert len(common.files_in(common.choose_photos(photographs, tmp_path, 0))) == 48
    with pytest.raises(UserError, match="expected 49 or more"):
        common.choose_photos(photographs, tmp_path, 49)


# ------------------------------------------------------------------------------------------------- command lines
SOURCES = {path.stem: path.read_text() for path in sorted((ROOT / "bench").glob("*.py"))}
WRITERS = [
    name
    for name, text in SOURCES.items()
    if "run_command(main)" in text
    and name != "report"
    and any(part in text for part in ('"--output"', "add_run_arguments(parser", "add_device_arguments(parser"))
]


@pytest.mark.parametrize("name", WRITERS)
def test_every_bench_refuses_a_place_for_its_figures_before_it_measures(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for folder in ("folder.json", "page.md"):
        (tmp_path / folder).mkdir()
    bench = importlib.import_module(f"bench.{name}")
    refused = {"x.md": "ends in .json", "x.png": "ends in .json", "folder.json": "is a folder", "page.json": "Markdown"}
    for place, message in {**refused, "file/x.json": "is a file"}.items():
        with pytest.raises(UserError, match=message):
            bench.main(["-o", str(tmp_path / place)])


def test_most_benches_are_among_them() -> None:
    assert {"step", "losses", "evidence", "evidence_beit", "loader", "views", "end_to_end"} <= {*WRITERS}


QUICK = {  # benches with --quick, and values of flags that it sets otherwise
    "loader": {"images": 49, "rounds": 7, "batch_size": 3, "sets": ["400"], "starts": 2, "wait_seconds": 0.25},
    "prepare": {"images": 49, "rounds": 7, "sets": ["400"]},
    "loader_arrays": {"images": 49, "rounds": 7, "batch_size": 3},
    "loader_before": {"images": 49, "rounds": 7},
    "prepare_arrays": {"tiles": 49, "rounds": 7},
}


@pytest.mark.parametrize("name", QUICK)
def test_what_is_given_beside_quick_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each flag that --quick sets, one at a time: it has its value, the others have --quick's."""
    assert {name for name, text in SOURCES.items() if '"--quick"' in text} == {*QUICK}
    bench, seen = importlib.import_module(f"bench.{name}"), list[argparse.Namespace]()
    monkeypatch.setattr(bench, "bench", lambda arguments, work: seen.append(arguments) or {})
    monkeypatch.setattr(bench, "report", str)
    first = {"loader": [str(tmp_path)], "prepare": [str(tmp_path)], "loader_before": [str(ROOT)]}.get(name, [])
    bench.main([*first, "--quick"])
    for flag, value in QUICK[name].items():
        words = map(str, value) if isinstance(value, list) else [str(value)]
        bench.main([*first, "--quick", f"--{flag}", *words])
        assert vars(seen[-1]) == {**vars(seen[0]), flag: value}
        assert vars(seen[0])[flag] != value
