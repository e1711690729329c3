#!/usr/bin/env bash
# Pack what a GPU machine without a network needs to run bench/gpu.sh: this repository as it is, and some small wheels.
#
#     bench/gpu_pack.sh [PYTHON_VERSION]    # of the machine that it is for, default 3.12; Linux on x86-64
#
# Writes build/gpu_pack/wheels and build/gpu_pack.tar (both ignored by git). There: tar xf gpu_pack.tar; bench/gpu.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-3.12}
python=${PYTHON:-.venv/bin/python}
wheels=build/gpu_pack/wheels
rm -rf build/gpu_pack build/gpu_pack.tar
mkdir -p "$wheels"
pinned=$("$python" - << 'END' # the versions that are installed here: those that the tests run with
import sys
from importlib.metadata import version

sys.path.insert(0, "bench")
from gpu_site import PACKAGES

print(*(f"{name}=={version(name)}" for name in PACKAGES))
END
)
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
for package in $pinned; do
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
        "${platforms[@]}" -d "$wheels" "$package" 2> /dev/null ||
        DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps -w "$wheels" "$package" # sources only: built here, of no platform
done
git describe --always --dirty --abbrev=40 > build/gpu_pack/commit
git ls-files -z --cached --others --exclude-standard | tar cf build/gpu_pack.tar --null -T - build/gpu_pack
du -sh "$wheels" build/gpu_pack.tar
