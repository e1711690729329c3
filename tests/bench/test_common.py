"""What the benches share: processor time, ratios, a choice of photographs."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import common
from fasthpm.errors import UserError


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
