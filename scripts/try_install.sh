#!/usr/bin/env bash
# Builds a wheel from a clean clone of HEAD, installs it into a fresh environment, and trains with it in an empty
# folder. Minutes, some GiB in $TMPDIR while it runs, and the network; tests/test_packaging.py does the quick part.
#     scripts/try_install.sh [PYTHON [EXTRAS]]      # e.g. python3.12 train,ffcv; default: python3 train
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:-python3} extras=${2:-train}
folder=$(mktemp -d "${TMPDIR:-/tmp}/fasthpm-install.XXXXXX")
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT

step() {
    local begin=$SECONDS
    "${@:2}" >"$folder/log" 2>&1 || {
        tail -n 30 "$folder/log" >&2
        printf 'try_install: error: %s failed, see above\n' "$1" >&2
        exit 1
    }
    printf 'try_install: %s: %d s\n' "$1" $((SECONDS - begin))
}

# The pins also hold where pip builds; the two names are for pip before and after 25.3.
export PIP_CONSTRAINT=$folder/clone/constraints.txt PIP_BUILD_CONSTRAINT=$folder/clone/constraints.txt
git clone --quiet . "$folder/clone"
step "environment" "$python" -m venv "$folder/venv"
PATH=$folder/venv/bin:$PATH
step "wheel" python -m pip wheel --no-deps --wheel-dir "$folder/dist" "$folder/clone"
step "install [$extras]" python -m pip install "$(echo "$folder"/dist/*.whl)[$extras]"

mkdir "$folder/empty"
cd "$folder/empty"
step "fasthpm recipes" fasthpm recipes
step "fasthpm pretrain" fasthpm pretrain --recipe debug --output_dir run --deepspeed_config zero1_fp32
step "the same again" fasthpm pretrain --recipe run/recipe.json --output_dir run
step "fasthpm export" fasthpm export run -o encoder.safetensors
step "fasthpm embed" fasthpm embed run --data_path synthetic:32 -o features.npz
step "from Python" python -c 'import fasthpm; print(fasthpm.pretrain(recipe="debug", output_dir="py", epochs=1, deepspeed_config="zero1_fp32"))'
printf 'try_install: %s with [%s] works\n' "$(python --version)" "$extras"
