#!/usr/bin/env bash
# Installs FastHPM for use from this folder: FFCV's system libraries and ffmpeg where missing, .venv, pinned packages.
# `make setup` runs it. Repeating it is quick, and goes on where a failed or killed run stopped.
#     PYTHON=/path/to/python3.12   chooses the interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)
cd "$root"

readonly extras="train,ffcv,webdataset,parquet,video,demo,hf,dense,onnx,tiff,dicom,nifti,hdf5,zarr,lz4,dev"
readonly stamp=.venv/.setup-stamp
readonly needed_gib=9
readonly dataset=/usr/share/datasets/fashion-mnist

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

# ---- Python ---------------------------------------------------------------------------------------------------------

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

is_supported() { [[ $1 =~ ^3\.(1[1-9]|[2-9][0-9])$ ]]; }

# Debian splits venv (ensurepip) and the C headers off its Python packages.
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() {
    "$1" -c 'import os, sysconfig as s; assert os.path.exists(os.path.join(s.get_paths()["include"], "Python.h"))' 2>/dev/null
}

# Prints the newest supported interpreter on PATH, one with venv and headers before one without.
# 3.14 comes last: it no longer forks its workers by default, which FFCV has not been tried with.
choose_python() {
    local name version seen="" incomplete=""
    if [ -n "${PYTHON:-}" ]; then
        version=$(version_of "$PYTHON") || die "PYTHON=$PYTHON does not run; give the path of a Python >= 3.11"
        is_supported "$version" || die "PYTHON=$PYTHON is Python $version; FastHPM needs 3.11 or newer"
        printf '%s\n' "$PYTHON"
        return
    fi
    for name in python3.13 python3.12 python3.11 python3.14 python3 python; do
        version=$(version_of "$name") || continue
        seen="${seen:+$seen, }$name is $version"
        is_supported "$version" || continue
        if has_venv "$name" && has_headers "$name"; then
            printf '%s\n' "$name"
            return
        fi
        incomplete=${incomplete:-$name}
    done
    [ -n "$incomplete" ] || die "no Python >= 3.11 on PATH (${seen:-no Python at all}); install one, or name it: make setup PYTHON=/path/to/python3.11"
    printf '%s\n' "$incomplete"
}

# ---- system packages ------------------------------------------------------------------------------------------------

# Prints, by their Debian names, what building FFCV and preparing videos need and do not find.
missing_packages() {
    local python=$1
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    { command -v ffmpeg && command -v ffprobe; } >/dev/null || echo ffmpeg
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    has_headers "$python" || echo "python$(version_of "$python")-dev"
    has_venv "$python" || echo "python$(version_of "$python")-venv"
}

may_install() {
    command -v apt-get >/dev/null && { [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null; }
}

# Without the lock's descriptor, which a service that a package starts would keep open.
as_root() { if [ "$(id -u)" -eq 0 ]; then "$@" 9>&-; else sudo -n "$@" 9>&-; fi; }

apt_install() {
    as_root apt-get -q -o DPkg::Lock::Timeout=300 update || say "apt-get update failed; trying with the package lists at hand"
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -q -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
}

install_system_packages() {
    local python=$1 packages
    mapfile -t packages < <(missing_packages "$python")
    [ "${#packages[@]}" -gt 0 ] || return 0
    local sudo="" remedy
    [ "$(id -u)" -eq 0 ] || sudo="sudo "
    remedy="${sudo}apt-get update && ${sudo}apt-get install -y --no-install-recommends ${packages[*]}"
    command -v apt-get >/dev/null ||
        die "missing ${packages[*]} (Debian's names) and there is no apt-get here; install your system's equivalents, then repeat: make setup"
    may_install ||
        die "missing system packages, and this user may not install them; run:  $remedy  then repeat: make setup"
    say "installing ${packages[*]} with apt-get (libopencv-dev alone can take some minutes)"
    apt_install "${packages[@]}" || die "apt-get failed, see above; run:  $remedy  then repeat: make setup"
    mapfile -t packages < <(missing_packages "$python")
    [ "${#packages[@]}" -eq 0 ] ||
        die "apt-get installed ${packages[*]}, but $python and $(command -v pkg-config) do not find them; leave any conda environment, or set PKG_CONFIG_PATH, then repeat: make setup"
}

offer_dataset() {
    [ ! -d "$dataset" ] || return 0
    if may_install && apt_install dataset-fashion-mnist; then return 0; fi
    say "the demo's data, Debian's package dataset-fashion-mnist, is not here: the demo will download Fashion-MNIST instead"
}

# ---- the virtual environment ----------------------------------------------------------------------------------------

# A moved folder or a half-made environment cannot be mended, only made anew.
venv_is_usable() {
    local version
    version=$(version_of .venv/bin/python) && is_supported "$version" || return 1
    [ -z "${PYTHON:-}" ] || [ "$version" = "$(version_of "$PYTHON" || true)" ] || return 1
    .venv/bin/python -c 'import pip' 2>/dev/null && grep -qsF "$root/.venv" .venv/pyvenv.cfg
}

fingerprint() {
    { printf '%s\n' "$root" && cat setup.cfg constraints.txt scripts/setup.sh; } | sha256sum | cut -d ' ' -f 1
}

is_up_to_date() { [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] && venv_is_usable; }

make_venv() {
    local python=$1 free_gib
    venv_is_usable && return
    free_gib=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
    [ "$free_gib" -ge "$needed_gib" ] ||
        die "$free_gib GiB free in $root; the virtual environment needs about $needed_gib GiB: free some space, then repeat: make setup"
    say "making .venv with $python ($(version_of "$python"))"
    "$python" -m venv --clear "$root/.venv" || die "$python could not make .venv, see above"
}

install_python_packages() {
    # By environment, the pins also hold where pip builds FFCV and DeepSpeed; the two names are for pip before and after 25.3.
    PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
        .venv/bin/python -m pip install --disable-pip-version-check -e ".[$extras]" -c constraints.txt ||
        die "pip failed, see above; mend the cause (network or disk space, most often), then repeat: make setup"
}

# -P keeps this folder off sys.path, so that fasthpm is found as installed.
check_imports() {
    local log=.venv/setup-check.log
    PATH="$root/.venv/bin:$PATH" .venv/bin/python -P -W ignore - >"$log" 2>&1 <<'PYTHON' || { tail -n 20 "$log" >&2 && die "the packages are installed but do not import, see above (all of it: $log)"; }
from importlib.metadata import version

import deepspeed, fasthpm, ffcv.loader, ffcv.writer, nvidia.dali, torch, torchvision

device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
names = ("fasthpm", "torch", "deepspeed", "ffcv", "timm")
print(", ".join(f"{name} {version(name)}" for name in names), "on", device)
PYTHON
    say "$(tail -n 1 "$log")"
}

# ---- all of it ------------------------------------------------------------------------------------------------------

main() {
    # torch does not quote the paths of its own libraries when it compiles.
    [[ $root != *[[:space:]]* ]] || die "the path '$root' has a space in it, which torch's compiler calls do not survive; move the folder"
    if is_up_to_date; then
        say ".venv is up to date"
        return
    fi
    local python
    python=$(choose_python)
    install_system_packages "$python"
    offer_dataset
    rm -f "$stamp"
    make_venv "$python"
    install_python_packages
    check_imports
    fingerprint >"$stamp.new" && mv "$stamp.new" "$stamp"
    say "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: FastHPM is installed in .venv; next: make demo, or make test"
}

# Settings that would send pip, or Python, somewhere other than .venv.
unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PYTHONPATH PYTHONHOME
PATH=:$PATH:
PATH=${PATH//":$root/.venv/bin:"/:} # .venv cannot be made anew by its own Python
PATH=${PATH#:} PATH=${PATH%:}

# One setup at a time; the lock is this file and ends with the process.
if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock -n 9 || { say "another setup is running in this folder; waiting for it" && flock 9; }
fi
trap 'die "interrupted; make setup goes on from here"' INT TERM
main
