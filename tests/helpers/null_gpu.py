"""Running programs on a GPU that does nothing (tests/nullgpu/README.md says what it can and cannot tell).

It is a library to preload, so that a program on it needs a process of its own.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import ROOT, kill_tree

SOURCES = ROOT / "tests" / "nullgpu"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasthpm-nullgpu"
LIBRARY = "libcuda.so.1"


def run_on_null_gpu(program: str | Path, *arguments: object, timeout: float = 300) -> dict[str, Any]:
    """Run a module (a dotted name) or a script (a path) from the repository's root, as if one GPU were there.

    Skips the test, with the reason, where the null GPU cannot be built.

    - `timeout`: seconds, after which the program is killed and the test fails with its output so far

    **Returns:** what the program's last line, a JSON object, says.
    """
    library = built()
    target = [str(program)] if isinstance(program, Path) else ["-m", program]
    command = [sys.executable, *target, *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(library), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException as error:
        kill_tree(process.pid)
        output, errors = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"{' '.join(command)} still ran after {timeout:g} s:\n{output}{errors}") from None
        raise
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}:\n{output}{errors}"
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


@functools.cache
def built() -> Path:
    """The library, compiled if it is not there yet (seconds); tests that run beside this one wait for it."""
    headers = _headers()
    sources = [*sorted(SOURCES.glob("*.cpp")), SOURCES / "null.h", Path(__file__)]
    said = repr([version("torch"), *headers, *(source.read_bytes() for source in sources)])
    folder = CACHE / hashlib.sha256(said.encode()).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as aside:
                _compile(Path(aside), headers)
                shutil.copytree(aside, folder.with_suffix(".new"), dirs_exist_ok=True)
            folder.with_suffix(".new").rename(folder)
    return folder / LIBRARY


def _headers() -> list[Path]:
    """The folders of CUDA's headers, as pip installs them: the runtime's, and what is missing there out of triton's."""
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"the null GPU is compiled, and there is no {tool}")
    if not (_package("torch") / "lib" / "libtorch_cuda.so").exists():
        pytest.skip(f"the null GPU needs a torch with CUDA; torch {version('torch')} has none")
    runtime = next(_package("nvidia").glob("*/include/cuda_runtime_api.h"), None)
    if runtime is None or not re.search(r"define CUDART_VERSION +13", runtime.read_text()):
        pytest.skip("the null GPU needs the headers of CUDA 13 (pip's nvidia-cuda-runtime)")
    triton = _package("triton") / "backends" / "nvidia" / "include"
    if not (triton / "crt" / "host_defines.h").exists():
        pytest.skip("the null GPU needs the headers that triton comes with")
    return [runtime.parent, triton]


def _package(name: str) -> Path:
    """The folder of a package, found without importing it."""
    spec = find_spec(name)
    return Path(next(iter(spec.submodule_search_locations or ()), "missing")) if spec else Path("missing")


def _compile(folder: Path, headers: list[Path]) -> None:
    stubs = folder / "stubs.cpp"
    stubs.write_text(_stubs())
    runtime, triton = headers
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-Wl,-soname,{LIBRARY}"]
    include = [f"-I{SOURCES}", f"-I{runtime}", "-idirafter", triton]
    sources = [*sorted(SOURCES.glob("*.cpp")), stubs]
    subprocess.run(["g++", *flags, *include, *sources, "-o", folder / LIBRARY, "-ldl"], check=True)


def _stubs() -> str:
    """Stubs for the cuBLAS and NCCL functions that torch calls and libraries.cpp does not have: counted, not run."""
    have = set(re.findall(r"\w+", (SOURCES / "libraries.cpp").read_text()))
    wanted: set[str] = set()
    for library in (_package("torch") / "lib").glob("libtorch_*.so"):
        out = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        names = {line.split()[-1].split("@")[0] for line in out.stdout.splitlines()}
        wanted |= {name for name in names if re.match(r"cublas|nccl[A-Z]", name)}
    quiet = re.compile("Set|Destroy|Get|Create|GroupStart|GroupEnd")
    lines = ['#include "null.h"']
    for name in sorted(wanted - have):
        call = "" if quiet.search(name) else f'count("{"N" if name.startswith("nccl") else "K"} {name}"); '
        lines.append(f"X long {name}(...) {{ {call}return 0; }}")
    return "\n".join(lines) + "\n"


def _environment(library: Path) -> dict[str, str]:
    """Ours with the null GPU, whose compiled kernels are kept apart from a real one's."""
    folder = library.parent
    ours = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
    return ours | {
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "CUDA_MODULE_LOADING": "LAZY",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def main(arguments: list[str]) -> None:
    """`python -m tests.helpers.null_gpu MODULE …`: run a module there, in the place of this process."""
    os.execvpe(sys.executable, [sys.executable, "-m", *arguments], _environment(built()))


if __name__ == "__main__":
    main(sys.argv[1:])
