"""What this machine is, what is installed, and what bounds training on your data.

    fasthpm doctor                                                     # machine and installation
    fasthpm doctor --recipe NAME [flags]                               # and the speed of its step
    fasthpm doctor --data_path in1k_train.beton --recipe NAME [flags]  # and what bounds training: about a minute

With data it measures, each alone and for a few seconds: decoding at the recipe's crop with all its threads, copying to
the GPU, and training steps on random images. The last line says which of them bounds training, and what to change.
Beside the step that it measures on a GPU stands what the model of fasthpm plan predicts for it.
Every flag of `fasthpm pretrain` may be given. Status 0 if pretraining can run here, 1 if not.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fasthpm import recipes
from fasthpm.cli import Parser, without_effect
from fasthpm.machine import count_cores, processor_name
from fasthpm.options import add_recipe_arguments
from fasthpm.recipe import Recipe, build_recipe

RECIPE = "hpm_vit_base_in1k_200e"
SECONDS, QUICK_SECONDS, TIMEOUT = 10.0, 1.0, 180.0
GIB, MIB = 2**30, 2**20
READ_BLOCK, READ_MOST, READ_SECONDS = 4 * MIB, 256 * MIB, 2.0
SAMPLED_FILES = 256  # of an image folder, to estimate its bytes and to read
ENOUGH = 1.1  # a supply is enough if it is so many times what the step takes
TAKEN, TIGHT = 0.02, 0.7  # shares of the cores that decoding may take without a word: of the step's own, of all
SMALLER_SIDE = 400
SYSTEM_PACKAGES = "libopencv-dev libturbojpeg0-dev pkg-config g++"
PARTS = ("decode", "copy", "step")
LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Finding:
    """One part of the installation."""

    name: str
    good: bool
    text: str  # what was found, or what follows from its lack and how to mend that
    needed: bool = True  # whether nothing can be pretrained without it

    def __str__(self) -> str:
        return f"  {'ok' if self.good else 'missing':8} {self.name:12} {self.text}"


@dataclass(frozen=True)
class Data:
    """What is to be trained on, as far as files tell."""

    files: tuple[Path, ...]  # all of them, or some of a folder's
    prepared: bool
    samples: int
    bytes_per_image: float
    longest_side: int = 0  # of stored images; 0 = unknown

    @property
    def bytes(self) -> float:
        """Of the whole set."""
        return self.samples * self.bytes_per_image


@dataclass(frozen=True)
class Rates:
    """Images per second of the whole machine, and what can be changed about them."""

    decode: float
    step: float  # of one device
    devices: int = 1
    gpu: bool = True
    copy: float | None = None  # to one device; None on a CPU
    disk: float | None = None  # None where memory holds the set, or nothing was read
    workers: int = 1  # decoding threads of the measurement
    cores: int = 1
    prepared: bool = True
    longest_side: int = 0


# ------------------------------------------------------------------------------------------------------ the verdict
def verdict(rates: Rates) -> str:
    """One line: what bounds training, by how much, and what to change."""
    wanted = rates.step * rates.devices
    supplies = {"decoding": rates.decode}
    if rates.copy is not None:
        supplies["copying to the GPU"] = rates.copy * rates.devices
    if rates.disk is not None:
        supplies["reading the disk"] = rates.disk
    name, supply = min(supplies.items(), key=lambda item: item[1])
    device = "GPU" if rates.gpu else "CPU"
    trained = f"{wanted:.3g} images/s by {rates.devices} {device}{'s' if rates.devices > 1 else ''}"
    if supply >= ENOUGH * wanted:
        advice = (
            "nothing to change in the data path; a larger --batch_size may help while GPU memory is free"
            if rates.gpu
            else "nothing to change in the data path; a GPU would help"
        )
        spare = _spare(rates, wanted)
        return f"the training step bounds ({trained}); {name} gives {supply / wanted:.1f} times that: {spare}{advice}"
    return f"{name} bounds ({supply:.3g} images/s, the step could take {trained}): {_advice(name, rates, wanted)}"


def _spare(rates: Rates, wanted: float) -> str:
    """What to know of a supply of crops that is enough, but not by much; empty if it is plenty.

    Decoding was measured alone: on a CPU it takes its time from the step, and beside a GPU little may disturb it.
    """
    share = wanted / rates.decode
    if not rates.gpu and share > TAKEN:
        return f"decoding takes about {100 * share / (1 + share):.0f} % of the same cores; "
    if rates.gpu and share > TIGHT:
        return f"decoding keeps {100 * share:.0f} % of {rates.workers} threads busy, expect some waiting for data; "
    return ""


def _advice(name: str, rates: Rates, wanted: float) -> str:
    if name == "copying to the GPU":
        return "check the GPU's PCIe link (nvidia-smi -q -d PERFORMANCE,PCIE) and that no other process uses it"
    if name == "reading the disk":
        return "copy the set to a local SSD, or prepare a smaller one that memory holds (--max_resolution 256)"
    if not rates.prepared:
        return "prepare the images first: python -m data_prep.images SRC OUT.beton"
    if rates.workers < rates.cores:
        return f"raise --num_workers from {rates.workers}; {rates.cores} cores are here (0 = all)"
    if rates.longest_side > SMALLER_SIDE:
        return f"prepare a smaller set (data_prep.images --max_resolution {SMALLER_SIDE}, or 256)"
    needed = -(-rates.cores * wanted // max(rates.decode, 1e-9))
    return (
        f"about {needed:.0f} cores would do; else store raw pixels (data_prep.images --write_mode raw), or use them all"
    )


# ------------------------------------------------------------------------------------------------------ installation
def check_torch() -> Finding:
    """torch, and whether it can use the GPU that is here."""
    torch = importlib.import_module("torch")
    cuda = torch.version.cuda
    if torch.cuda.is_available():
        return Finding("torch", True, f"{torch.__version__}, CUDA {cuda}")
    if shutil.which("nvidia-smi") and Path("/dev/nvidia0").exists():
        driver = f"update the driver to one for CUDA {cuda}" if cuda else "install a torch with CUDA (pytorch.org)"
        return Finding("torch", False, f"{torch.__version__} cannot use the GPU that is here: {driver}", needed=False)
    return Finding("torch", True, f"{torch.__version__}, no GPU to use")


def check_deepspeed() -> Finding:
    """DeepSpeed, imported."""
    if not importlib.import_module("torch").cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return _imported("DeepSpeed", "deepspeed", "pretraining needs it: pip install 'fasthpm[train]'")


def check_ffcv() -> Finding:
    """FFCV, imported; and, where it is not, whether it could be built."""
    tools = [tool for tool in ("g++", "pkg-config") if not shutil.which(tool)]
    absent = f" (not here: {', '.join(tools)})" if tools else ""
    how = f"preparing images needs it: apt-get install {SYSTEM_PACKAGES}{absent}, then pip install 'fasthpm[ffcv]'"
    return _imported("FFCV", "ffcv", how, needed=False)


def check_kernel() -> Finding:
    """The compiled loop that decodes prepared sets."""
    how = "prepared sets cannot be read, image folders can: apt-get install libturbojpeg0, pip install 'fasthpm[ffcv]'"
    begin = time.perf_counter()
    finding = _imported("decoder", "fasthpm.data.ffcv.kernel", how, needed=False)
    took = time.perf_counter() - begin
    return dataclasses.replace(finding, text=f"compiled, ready in {took:.1f} s") if finding.good else finding


def check_numba_cache() -> Finding:
    """A folder that keeps compiled code between processes."""
    places = (os.environ.get("NUMBA_CACHE_DIR", ""), str(Path(__file__).parents[1] / "data"), os.path.expanduser("~"))
    for folder in filter(None, places):
        if os.access(folder, os.W_OK):
            return Finding("numba cache", True, folder)
    text = "every process compiles again (some seconds): set NUMBA_CACHE_DIR to a folder that can be written"
    return Finding("numba cache", False, text, needed=False)


def check_jpeg() -> Finding:
    """PIL's JPEG codec, which reads image folders."""
    features = importlib.import_module("PIL.features")
    if not features.check("jpg"):
        return Finding("JPEG codec", False, "PIL was built without it: pip install --force-reinstall pillow", False)
    turbo = features.version_feature("libjpeg_turbo") if features.check_feature("libjpeg_turbo") else None
    return Finding("JPEG codec", True, f"libjpeg-turbo {turbo}" if turbo else "libjpeg, without turbo: slower")


def check_dali() -> Finding:
    """DALI, imported."""
    return _imported("DALI", "nvidia.dali", "only videos need it: pip install 'fasthpm[video]'", needed=False)


def check_ffmpeg() -> Finding:
    """The programs that `data_prep.videos` runs, on PATH."""
    missing = [tool for tool in ("ffmpeg", "ffprobe") if shutil.which(tool) is None]
    how = f"no {' and no '.join(missing)}; only preparing videos needs it: apt-get install ffmpeg"
    return Finding("ffmpeg", not missing, how if missing else "found", needed=False)


def _imported(name: str, module: str, how: str, *, needed: bool = True) -> Finding:
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a broken installation can raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Finding(name, False, f"{reason}; {how}", needed)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return Finding(name, True, importlib.metadata.version(module), needed)
    return Finding(name, True, str(getattr(found, "__version__", "imported")), needed)


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_torch,
    check_deepspeed,
    check_ffcv,
    check_kernel,
    check_numba_cache,
    check_jpeg,
    check_dali,
    check_ffmpeg,
)


def check_install() -> Iterator[Finding]:
    """All checks, one after another; a check that breaks is a finding too."""
    for check in CHECKS:
        try:
            yield check()
        except Exception as error:
            yield Finding(check.__name__.removeprefix("check_"), False, f"could not be checked: {error!r}")


# ------------------------------------------------------------------------------------------------------ the machine
def describe_machine(folder: Path) -> list[str]:
    """GPUs, processor, memory, disk."""
    import torch

    lines = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        lines.append(f"  GPU {index}      {name}, {total / GIB:.0f} GiB, {free / GIB:.0f} free")
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    return [
        *(lines or ["  GPU        none: this runs on the CPU"]),
        f"  cores      {count_cores()} ({processor_name()})",
        f"  memory     {memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} free",
        f"  disk       {disk.free / GIB:.0f} GiB free in {folder}",
    ]


def look_at_data(data_path: str) -> Data:
    """Files, sizes and number of samples of a data source.

    **Raises:** `UserError` if it cannot be used.
    """
    from fasthpm.data import read_info
    from fasthpm.data.pixels import list_images

    if data_path.startswith("synthetic:"):
        return Data((), False, read_info(data_path).num_samples, 0.0)
    files = prepared_files(data_path)
    if files or data_path.endswith(".beton"):
        samples = read_info(data_path).num_samples  # says what is wrong with a set that is missing or damaged
        size = sum(file.stat().st_size for file in files)
        return Data(tuple(files), True, samples, size / samples, longest_side(files[0]))
    found = list_images(Path(data_path)).paths
    some = [Path(found[index * len(found) // SAMPLED_FILES]) for index in range(SAMPLED_FILES)]
    some = list(dict.fromkeys(some))
    return Data(tuple(some), False, len(found), sum(file.stat().st_size for file in some) / len(some))


def prepared_files(data_path: str) -> list[Path]:
    """The `.beton` files that a data path names: one, its shards, or a comma list of these; none for other sources."""
    files: list[Path] = []
    for part in data_path.split(","):
        path = Path(part)
        if path.suffix == ".beton":
            files += [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*.beton"))
    return files


def longest_side(path: Path) -> int:
    """Of the images that a prepared set stores; 0 if its sidecar does not say."""
    from fasthpm.data.ffcv.beton import sidecar_path

    try:
        sidecar = json.loads(sidecar_path(path).read_text())
        return max(sidecar["max_height"], sidecar["max_width"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def read_rate(files: Sequence[Path]) -> float:
    """Bytes per second that the disk gives, over at most two seconds, from spread places.

    What is read is dropped from the page cache first, so that the disk is measured; where the system does not do that,
    the rate is the cache's.
    """
    read, begin = 0, time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for start in range(0, size, max(READ_BLOCK, size * READ_BLOCK // READ_MOST)):
                stream.seek(start)
                read += len(stream.read(READ_BLOCK))
                if read >= READ_MOST or time.perf_counter() - begin > READ_SECONDS:
                    return read / (time.perf_counter() - begin)
    return read / max(time.perf_counter() - begin, 1e-9)


# ------------------------------------------------------------------------------------------------------ measuring
def measure(
    recipe: Recipe, seconds: float, timeout: float = TIMEOUT, asked_for: Sequence[str] = PARTS
) -> Iterator[dict[str, Any]]:
    """What `fasthpm.commands.throughput` finds, part by part: {"part", "images_per_second", …} or {"part", "error"}.

    In a process of its own: one that dies or takes longer than `timeout` is a finding, not the end of this one.
    """
    parts = list(asked_for)
    asked = json.dumps({"recipe": dataclasses.asdict(recipe), "seconds": seconds, "parts": parts})
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "fasthpm.commands.throughput", asked]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            timer = threading.Timer(timeout, process.kill)
            timer.start()
            try:
                for line in process.stdout or ():
                    found = json.loads(line)
                    parts.remove(found["part"])
                    yield found
                process.wait()
                overdue = not timer.is_alive()
            except BaseException:
                process.kill()
                raise
            finally:
                timer.cancel()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
        status = process.returncode
    why = f"not known after {timeout:.0f} s" if overdue else f"its process ended with status {status} {last}".strip()
    yield from ({"part": part, "error": why} for part in parts)


def describe(found: dict[str, Any]) -> str:
    """A line about one measurement."""
    part = found["part"]
    if "error" in found:
        text = f"could not be measured: {found['error']}"
    elif "images_per_second" not in found:
        text = "nothing to copy: there is no GPU"
    else:
        text = f"{found['images_per_second']:.4g} images/s"
        details = {"workers": "{:.0f} threads", "batch_size": "batch {:.0f}", "memory_gib": "{:.1f} GiB of GPU memory"}
        details["attention"] = "attention by {}"
        known = [form.format(found[name]) for name, form in details.items() if name in found]
        text += f" ({', '.join(known)})" if known else ""
    return f"  {part:10} {text}"


def predicted(recipe: Recipe, found: dict[str, Any]) -> str:
    """The line of `expected.predict`; torch is imported late here, as what is broken shall be a finding."""
    from fasthpm.commands.expected import predict

    return predict(recipe, found)


def diagnose_step(recipe: Recipe, seconds: float) -> tuple[bool, str]:
    """As `diagnose`, of the step alone."""
    (found,) = measure(recipe, seconds, asked_for=("step",))
    print(describe(found), flush=True)
    if "error" in found:
        return False, f"pretraining cannot run here: step: {found['error']}"
    print(predicted(recipe, found), flush=True)
    return True, "pretraining can run here; add --data_path to learn what bounds it"


def diagnose(recipe: Recipe, seconds: float) -> tuple[bool, str]:
    """Measure everything, say it line by line; returns whether training runs, and the closing line."""
    from fasthpm.errors import UserError

    try:
        data = look_at_data(recipe.data_path)
    except (UserError, OSError) as error:
        return False, f"pretraining cannot run here: {error}"
    disk = read_rate(data.files) if data.files else None
    if disk is not None:
        fits = "memory holds it" if data.bytes < psutil.virtual_memory().available else "more than free memory"
        print(f"  disk       reads {disk / MIB:.0f} MiB/s; the set has {data.bytes / GIB:.2f} GiB ({fits})", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for one in measure(recipe, seconds):
        found[one["part"]] = one
        print(describe(one), flush=True)
        if one["part"] == "step" and "error" not in one:
            print(predicted(recipe, one), flush=True)
    errors = [f"{part}: {one['error']}" for part, one in found.items() if "error" in one]
    if errors:
        return False, f"pretraining cannot run here: {errors[0]}"
    return True, verdict(rates_of(found, data, disk))


def rates_of(found: dict[str, dict[str, Any]], data: Data, disk: float | None) -> Rates:
    """The measurements as `verdict` takes them."""
    import torch

    in_memory = data.bytes < psutil.virtual_memory().available
    return Rates(
        decode=found["decode"]["images_per_second"],
        step=found["step"]["images_per_second"],
        devices=max(torch.cuda.device_count(), 1),
        gpu=torch.cuda.is_available(),
        copy=found["copy"].get("images_per_second"),
        disk=None if disk is None or in_memory else disk / data.bytes_per_image,
        workers=found["decode"]["workers"],
        cores=count_cores(),
        prepared=data.prepared or not data.files,
        longest_side=data.longest_side,
    )


# ------------------------------------------------------------------------------------------------------ command
def parse_arguments(argv: Sequence[str] | None) -> tuple[Recipe, float, bool]:
    """The recipe to measure, the seconds for each part, and whether the recipe was named."""
    parser = Parser(prog="fasthpm doctor", description=__doc__)
    parser.add_argument("--recipe", default="", help=f"measure this one (default {RECIPE}), or a recipe.json")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS:g} s for each part, not {SECONDS:g}")
    add_recipe_arguments(parser, Recipe)
    given = vars(parser.parse_args(argv))
    if not given["recipe"] and not given.get("data_path"):
        fields = [field.name for field in dataclasses.fields(Recipe) if field.name not in ("recipe", "data_path")]
        idle = ["quick", *fields, *(f"no-{name}" for name in fields)]
        without_effect(idle, "nothing is measured without --recipe or --data_path")
    seconds = QUICK_SECONDS if given.pop("quick") else SECONDS
    name = given.pop("recipe")
    base = recipes.from_name(name or RECIPE)
    return build_recipe({**dataclasses.asdict(base), **given}, source="command line"), seconds, bool(name)


def main(argv: Sequence[str] | None = None) -> None:
    """`fasthpm doctor`."""
    recipe, seconds, named = parse_arguments(argv)
    files = prepared_files(recipe.data_path)
    folder = files[0].parent if files else Path(recipe.data_path)
    print("machine", *describe_machine(folder if folder.is_dir() else Path.cwd()), "installation", sep="\n", flush=True)
    findings = []
    for finding in check_install():
        findings.append(finding)
        print(finding, flush=True)
    lacking = [finding for finding in findings if finding.needed and not finding.good]
    if lacking:
        good, closing = False, f"pretraining cannot run here: {lacking[0].name}: {lacking[0].text}"
    elif recipe.data_path:
        print(f"measured, {recipe.recipe}, {recipe.input_size} pixels, {recipe.data_path}", flush=True)
        good, closing = diagnose(recipe, seconds)
    elif named:
        print(f"measured, {recipe.recipe}, {recipe.input_size} pixels", flush=True)
        good, closing = diagnose_step(recipe, seconds)
    else:
        good, closing = True, "pretraining can run here; add --data_path and --recipe to learn what bounds it"
    print(closing)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    from fasthpm.cli import run_command

    run_command(main)
