"""The wheel: what is in it, and that it works where the repository is not; Dockerfile and environment.yml agree.

Quick by leaving the dependencies out: the fresh environment borrows those of this one. `scripts/try_install.sh`
installs them too.
"""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from fasthpm.commands.doctor import SYSTEM_PACKAGES
from tests.helpers.launch import ROOT

PACKAGES = ("fasthpm", "data_prep", "bench", "ds_configs")
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
VERSIONS = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
PRESETS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


def run(*words: object, cwd: Path | None = None, status: int = 0) -> str:
    """stdout and stderr of a command that ends with `status`, away from this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == status, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def checked_in(*folders: str) -> list[str]:
    """Files of the checkout, those included that git does not know yet."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders, cwd=ROOT).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders behind."""
    copy = tmp_path_factory.mktemp("source")
    for name in checked_in():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, copy)
    return next(folder.glob("*.whl"))


def environment(folder: Path, interpreter: str | Path, wheel: Path) -> Path:
    """A fresh environment with the wheel and nothing else. **Returns:** its Python."""
    run(interpreter, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that borrows this one's libraries, but not its editable fasthpm."""
    python = environment(tmp_path_factory.mktemp("venv"), sys.executable, wheel)
    site_packages = next(python.parents[1].glob("lib/python*/site-packages"))
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python.parent


# ------------------------------------------------------------------------------------------------------ the wheel
def test_the_wheel_holds_the_packages_and_presets_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    code = [name for name in checked_in(*PACKAGES) if name.endswith(".py")]
    presets = [f"ds_configs/{name}" for name in ("README.md", *(f"{name}.json" for name in PRESETS))]
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(code + presets)


def test_outside_the_repository_the_wheel_pretrains(installed: Path, tmp_path: Path) -> None:
    python, fasthpm = installed / "python", installed / "fasthpm"
    where = run(python, "-c", "import fasthpm; print(fasthpm.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))
    assert "debug" in run(fasthpm, "recipes", cwd=tmp_path)
    words = ("pretrain", "--recipe", "debug", "--output_dir", "x", "--stop_after", 1)
    run(fasthpm, *words, "--deepspeed_config", "zero1_fp32", cwd=tmp_path)
    assert json.loads((tmp_path / "x" / "versions.json").read_text())["commit"] == "unknown"
    assert "agrees within" in run(fasthpm, "export", "x", "-o", "encoder.safetensors", cwd=tmp_path)
    call = "import fasthpm; print(fasthpm.embed('x', data_path='synthetic:8', output='features.npz'))"
    assert "EmbedResult" in run(python, "-c", call, cwd=tmp_path)
    goes_on_with_a_recipe_of_before(fasthpm, tmp_path)


def goes_on_with_a_recipe_of_before(fasthpm: Path, folder: Path) -> None:
    """A recorded path that only opens from the repository's root, in a run that has moved; and a name that is wrong."""
    recipe = json.loads((folder / "x" / "recipe.json").read_text())
    assert recipe["deepspeed_config"] == "zero1_fp32"
    (folder / "x").rename(folder / "moved")
    before = folder / "recipe.json"
    before.write_text(json.dumps({**recipe, "deepspeed_config": "ds_configs/zero1_fp32.json"}))
    words = ("pretrain", "--recipe", before, "--output_dir", "moved", "--stop_after", 2)
    run(fasthpm, *words, cwd=folder)
    assert (folder / "moved" / "checkpoints" / "step-00000002").is_dir()
    told = run(fasthpm, *words, "--deepspeed_config", "zero1_f32", cwd=folder, status=2)
    assert "did you mean 'zero1_fp32'" in told
    assert told.count("\n") == 1, told


# ------------------------------------------------------------------------------------------------------ interpreters
def interpreter(version: str) -> Path | None:
    """A Python of this version, on PATH or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [*pyenv.glob(f"{version}.*/bin/python{version}"), shutil.which(f"python{version}")]
    return next((Path(path) for path in found if path and works(path)), None)


def works(path: str | Path) -> bool:
    """Whether it starts, which pyenv's stand-ins may not, and can make environments, which Debian's may not."""
    return subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_every_python_that_setup_cfg_names_takes_the_wheel(version: str, wheel: Path, tmp_path: Path) -> None:
    found = interpreter(version)
    if found is None:
        pytest.skip(f"no Python {version} here")
    python = environment(tmp_path / "venv", found, wheel)
    site_packages = next(python.parents[1].glob("lib/python*/site-packages"))
    run(python, "-W", "error", "-m", "compileall", "-q", *(site_packages / package for package in PACKAGES))
    assert (python.parent / "fasthpm").is_file()


def test_the_oldest_python_is_one_that_was_tried() -> None:
    assert SETUP["options"]["python_requires"] == f">={VERSIONS[0]}"


# ------------------------------------------------------------------------------------------------------ other ways in
def pinned() -> set[str]:
    """Names in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#")}


def required(lines: str) -> set[str]:
    return set(re.findall(r"^([\w-]+)", lines, flags=re.MULTILINE))


def extras_in(text: str) -> list[str]:
    """Of the one `.[a,b]` in a text."""
    [found] = re.findall(r"\.\[([\w,$]+)\]", text)
    return found.split(",")


def instructions() -> dict[str, list[str]]:
    """Of the Dockerfile: the arguments of each instruction, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, list[str]] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line:
            found.setdefault(line.split()[0], []).append(" ".join(line.split()[1:]))
    return found


def without_version(packages: Sequence[str]) -> set[str]:
    return {re.sub(r"^python3\.\d+-", "python-", package) for package in packages}


def apt_packages() -> set[str]:
    """What scripts/setup.sh may install."""
    script = (ROOT / "scripts" / "setup.sh").read_text()
    [body] = re.findall(r"^missing_packages\(\) \{\n(.*?)^\}", script, flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r'\|\| echo "?(.+?)"?$', body, flags=re.MULTILINE)
    return {re.sub(r"^python\$\(.*\)-", "python-", name) for name in names}


def test_every_requirement_is_pinned() -> None:
    for lines in (SETUP["options"]["install_requires"], *SETUP["options.extras_require"].values()):
        assert required(lines) <= pinned()


def test_the_dockerfile_installs_what_setup_does() -> None:
    of = instructions()
    [install] = re.findall(r"apt-get install -y --no-install-recommends (.+?) &&", of["RUN"][0])
    assert without_version(install.split()) == apt_packages()
    assert set(SYSTEM_PACKAGES.split()) < apt_packages()
    assert "PIP_CONSTRAINT=constraints.txt" in of["RUN"][1]
    assert {"train", "ffcv"} <= set(extras_in(of["RUN"][1])) <= set(SETUP["options.extras_require"])
    assert set(re.findall(r"python(3\.\d+)", " ".join(of["RUN"]))) <= set(VERSIONS)
    assert of["USER"] == ["10001"]
    assert of["CMD"] == ['["fasthpm", "doctor"]']


def test_the_image_has_the_cuda_that_is_pinned() -> None:
    [major, minor] = re.findall(r"^nvidia/cuda:(\d+)\.(\d+)\.\d+-base-", instructions()["FROM"][0])[0]
    assert f"nvidia-dali-cuda{major}{minor}" in pinned()


def test_the_image_s_context_is_what_the_wheel_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    assert kept == {*PACKAGES, "setup.cfg", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}


def test_the_conda_environment_agrees() -> None:
    told = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [item for item in told["dependencies"] if isinstance(item, str)]
    [pip] = [item["pip"] for item in told["dependencies"] if isinstance(item, dict)]
    assert conda[0].removeprefix("python=") in VERSIONS
    assert not {name.partition("=")[0] for name in conda} & pinned(), "pip's constraints alone pin Python packages"
    assert pip[0] == "-c constraints.txt"
    assert {"train", "ffcv"} <= set(extras_in(pip[1])) <= set(SETUP["options.extras_require"])
