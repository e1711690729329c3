"""`fasthpm doctor`: its verdict, what it says about missing parts, and real runs on small data."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fasthpm import recipes
from fasthpm.commands import doctor
from fasthpm.commands.doctor import Finding, Rates, verdict
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, prepare
from tests.helpers.launch import ROOT

H200 = Rates(decode=20000, step=5000, copy=100000, workers=16, cores=16, longest_side=500)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 images, and `set.beton` made of it, with one channel each."""
    folder = tmp_path_factory.mktemp("doctor")
    prepare(image_folder(folder / "images", 12), folder / "set.beton")
    return folder


# ------------------------------------------------------------------------------------------------------ the verdict
@pytest.mark.parametrize(
    ("changes", "bound", "advice"),
    [
        ({}, "the training step bounds (5e+03 images/s by 1 GPU); decoding gives 4.0 times that", "batch_size"),
        ({"gpu": False, "copy": None}, "the training step bounds (5e+03 images/s by 1 CPU)", "a GPU would help"),
        ({"devices": 8}, "decoding bounds (2e+04 images/s, the step could take 4e+04 images/s by 8 GPUs)", "400"),
        ({"decode": 1000, "prepared": False}, "decoding bounds", "prepare the images first"),
        ({"decode": 1000, "workers": 2}, "decoding bounds", "raise --num_workers from 2; 16 cores"),
        ({"decode": 1000}, "decoding bounds", "--max_resolution 400"),
        ({"decode": 1000, "longest_side": 400}, "decoding bounds", "about 80 cores would do"),
        ({"decode": 1000, "longest_side": 0}, "decoding bounds", "about 80 cores would do"),
        ({"copy": 3000}, "copying to the GPU bounds (3e+03 images/s", "PCIe"),
        ({"disk": 2000}, "reading the disk bounds (2e+03 images/s", "local SSD"),
        ({"disk": 2000, "decode": 1000, "workers": 2}, "decoding bounds", "--num_workers"),
        ({"decode": 5400}, "decoding bounds", "--max_resolution 400"),  # too little to spare
        ({"decode": 5600}, "the training step bounds", "batch_size"),
        ({"decode": 5600}, "the training step bounds", "keeps 89 % of 16 threads busy, expect some waiting for data"),
        ({"gpu": False, "copy": None, "decode": 10000}, "the training step bounds", "33 % of the same cores"),
        ({"copy": 6000, "devices": 2}, "the training step bounds (1e+04 images/s by 2 GPUs); copying", "1.2 times"),
    ],
)
def test_verdict(changes: dict[str, Any], bound: str, advice: str) -> None:
    line = verdict(dataclasses.replace(H200, **changes))
    assert line.startswith(bound)
    assert advice in line
    assert "\n" not in line


# ------------------------------------------------------------------------------------------------------ installation
@pytest.mark.parametrize(
    ("check", "module", "name", "needed", "how"),
    [
        (doctor.check_deepspeed, "deepspeed", "DeepSpeed", True, "pip install 'fasthpm[train]'"),
        (doctor.check_ffcv, "ffcv", "FFCV", False, "pip install 'fasthpm[ffcv]'"),
        (doctor.check_kernel, "fasthpm.data.ffcv.kernel", "decoder", False, "image folders can"),
        (doctor.check_dali, "nvidia.dali", "DALI", False, "pip install 'fasthpm[video]'"),
    ],
)
def test_a_missing_part_is_a_finding(
    check: Any, module: str, name: str, needed: bool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    finding = check()
    assert (finding.name, finding.good, finding.needed) == (name, False, needed)
    assert how in finding.text
    assert str(finding).startswith("  missing ")


def test_ffcv_lacks_its_build_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "g++" else f"/usr/bin/{name}")
    assert "(not here: g++)" in doctor.check_ffcv().text


def test_a_missing_ffmpeg_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_ffmpeg().good
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ffprobe" else f"/usr/bin/{name}")
    finding = doctor.check_ffmpeg()
    assert not finding.good
    assert "no ffprobe; only preparing videos needs it" in finding.text


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(Path, "exists", lambda self: True)
    finding = doctor.check_torch()
    assert not finding.good
    assert "cannot use the GPU" in finding.text


def test_no_place_for_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_numba_cache().good
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    finding = doctor.check_numba_cache()
    assert not finding.good
    assert not finding.needed
    assert "NUMBA_CACHE_DIR" in finding.text


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_codec() -> Finding:
        raise ValueError("odd")

    monkeypatch.setattr(doctor, "CHECKS", (check_codec, doctor.check_jpeg))
    broken, fine = doctor.check_install()
    assert (broken.name, broken.good, fine.good) == ("codec", False, True)
    assert "odd" in broken.text


def test_status_1_where_a_needed_part_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_deepspeed,))
    with pytest.raises(SystemExit) as stopped:
        doctor.main([])
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("pretraining cannot run here: DeepSpeed")


def test_status_0_where_only_extras_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor, "CHECKS", (lambda: Finding("torch", True, "2"), lambda: Finding("DALI", False, "absent", needed=False))
    )
    doctor.main([])
    output = capsys.readouterr().out
    assert "missing  DALI" in output
    assert output.splitlines()[-1].startswith("pretraining can run here")


# ------------------------------------------------------------------------------------------------------ data
def test_data_of_every_form(data: Path) -> None:
    beton = data / "set.beton"
    one = doctor.look_at_data(str(beton))
    assert (one.files, one.prepared, one.samples, one.longest_side) == ((beton,), True, 12, 48)
    assert one.bytes == pytest.approx(beton.stat().st_size)
    folder = doctor.look_at_data(str(data / "images"))
    sizes = [file.stat().st_size for file in (data / "images").rglob("*.png")]
    assert (len(folder.files), folder.prepared, folder.samples) == (12, False, 12)
    assert folder.bytes == pytest.approx(sum(sizes))
    drawn = doctor.look_at_data("synthetic:7")
    assert (drawn.files, drawn.samples, drawn.bytes) == ((), 7, 0)


def test_shards_and_lists_are_found(tmp_path: Path) -> None:
    for name in ("a-00001-of-00002", "a-00000-of-00002", "b"):
        (tmp_path / f"{name}.beton").touch()
    found = doctor.prepared_files(f"{tmp_path}/a.beton,{tmp_path}/b.beton")
    assert [file.stem for file in found] == ["a-00000-of-00002", "a-00001-of-00002", "b"]
    assert doctor.prepared_files(str(tmp_path)) == []


def test_read_rate_reads_all_of_a_small_file_and_some_of_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small").write_bytes(bytes(1000))
    (tmp_path / "large").write_bytes(bytes(100_000))
    monkeypatch.setattr(doctor, "READ_BLOCK", 1000)
    monkeypatch.setattr(doctor, "READ_MOST", 20_000)
    ticks = iter(range(1000))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: 0.0 if next(ticks) == 0 else 1.0)
    assert doctor.read_rate([tmp_path / "small"]) == 1000
    ticks = iter(range(1000))
    assert doctor.read_rate([tmp_path / "large"]) == 20_000


# ------------------------------------------------------------------------------------------------------ real runs
PICO = ("--model", "hpm_vit_pico_patch4_28")  # a step of seconds where bf16 is emulated


def run_doctor(*flags: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fasthpm", "doctor", "--quick", "--recipe", "debug", *PICO, *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_real_run_measures_everything(data: Path) -> None:
    done = run_doctor("--data_path", data / "set.beton", "--channels", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("  cores ") for line in lines)
    assert any(line.startswith("  ok       torch") for line in lines)
    assert any(line.startswith("  ok       decoder") for line in lines)
    assert any(line.startswith("  disk       reads ") for line in lines)
    for part in ("decode", "step"):
        (line,) = (line for line in lines if line.startswith(f"  {part} "))
        assert float(line.split()[1]) > 0
    assert " bounds (" in lines[-1]


def measured(monkeypatch: pytest.MonkeyPatch, *found: dict[str, Any]) -> None:
    """Let the measuring process find this."""
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(doctor, "measure", lambda recipe, seconds: iter(found))


STEP = {"part": "step", "images_per_second": 100.0, "batch_size": 16}


def test_a_step_alone_is_measured_where_there_is_no_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(doctor, "measure", lambda recipe, seconds, asked_for: iter([STEP]))
    doctor.main(["--recipe", "hpm_demo"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "  step       100 images/s (batch 16)",
        "  predicted  of GPUs only: fasthpm plan hpm_demo --gpu h100 says what one would do",
        "pretraining can run here; add --data_path to learn what bounds it",
    ]


def test_a_measurement_that_fails_is_said_and_gives_status_1(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(
        monkeypatch,
        {"part": "decode", "images_per_second": 10.0, "workers": 1},
        {"part": "copy"},
        {"part": "step", "error": "OutOfMemoryError: too large"},
    )
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--data_path", str(data / "set.beton")])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "  step       could not be measured: OutOfMemoryError: too large"
    assert lines[-1] == "pretraining cannot run here: step: OutOfMemoryError: too large"


def test_data_that_is_not_there_gives_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--data_path", str(tmp_path / "none.beton")])
    assert stopped.value.code == 1
    assert "does not exist" in capsys.readouterr().out.splitlines()[-1]


def measure_with(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout: float) -> list[dict[str, Any]]:
    """What `measure` makes of a process that runs `script`."""
    (tmp_path / "python").write_text(f"#!{sys.executable}\n{script}")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    recipe, *_ = doctor.parse_arguments(["--recipe", "debug"])
    return list(doctor.measure(recipe, 1.0, timeout))


@pytest.mark.parametrize("name", ["hpm_video_demo", "hpm_demo"])
def test_the_step_of_images_and_of_clips_is_measured(name: str) -> None:
    recipe = dataclasses.replace(recipes.from_name(name), batch_size=2)
    (found,) = doctor.measure(recipe, 0.01, asked_for=("step",))
    assert found["images_per_second"] > 0, found


DECODED = json.dumps({"part": "decode", "images_per_second": 5.0, "workers": 1})


def test_a_process_that_dies_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"import os\nprint('''{DECODED}''', flush=True)\nos.write(2, b'no memory\\n')\nos.abort()\n"
    decode, copy, step = measure_with(script, tmp_path, monkeypatch, 60)
    assert decode["images_per_second"] == 5.0
    assert copy == {"part": "copy", "error": "its process ended with status -6 no memory"}
    assert step["part"] == "step"


def test_a_process_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"import time\nprint('''{DECODED}''', flush=True)\ntime.sleep(600)\n"
    found = measure_with(script, tmp_path, monkeypatch, 1)
    assert [one["part"] for one in found] == ["decode", "copy", "step"]
    assert "not known after 1 s" in found[-1]["error"]


def test_wrong_flags_are_one_line() -> None:
    with pytest.raises(UserError, match="did you mean '--data_path'"):
        doctor.main(["--data_pth", "x"])
    with pytest.raises(UserError, match="unknown recipe"):
        doctor.main(["--recipe", "hpm_vit_bas"])


@pytest.mark.parametrize("words", ["--quick", "--batch_size 7", "--input_size=32", "--no-flip", "--norm_pix_loss"])
def test_flags_of_what_is_not_measured_are_refused(words: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is looked at; with a recipe or data they say what is measured."""
    with pytest.raises(UserError, match=r"has no effect here: nothing is measured without --recipe or --data_path"):
        doctor.main(words.split())
    assert capsys.readouterr().out == ""
    for more in (["--recipe", "debug"], ["--data_path", str(data / "set.beton")]):
        doctor.parse_arguments([*words.split(), *more])


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in doctor.LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)
    return


def test_a_gpus_step_names_its_kernels_of_attention() -> None:
    found = {
        "part": "step",
        "images_per_second": 2000.0,
        "batch_size": 256,
        "memory_gib": 19.4,
        "attention": "cudnn, flash",
    }
    assert doctor.describe(found).endswith("(batch 256, 19.4 GiB of GPU memory, attention by cudnn, flash)")
