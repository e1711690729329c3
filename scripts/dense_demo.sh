#!/usr/bin/env bash
# The demo behind `make dense_demo`: garments on photographs → HPM → segmentation and detection, with pictures.
#     DATA=data/scenes OUT=runs/dense_demo RANKS=2      change where things are and how many processes pretrain
# A second run finds everything done and only reports; a killed one goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly data=${DATA:-data/scenes} out=${OUT:-runs/dense_demo}
readonly python=$PWD/.venv/bin/python fasthpm=$PWD/.venv/bin/fasthpm
readonly packages="lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers ukui-wallpapers"
export PYTHONWARNINGS=ignore TQDM_MININTERVAL=${TQDM_MININTERVAL:-1}

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
readonly ranks=${RANKS:-$([ "$gpus" -gt 0 ] && echo "$((gpus < 2 ? gpus : 2))" || echo 2)}

# A CPU without bf16 instructions emulates them, many times slower than float32.
preset=zero1_bf16
[ "$gpus" -gt 0 ] || "$python" -c 'from fasthpm.machine import cpu_has_bf16 as fast; exit(not fast())' || preset=zero1_fp32
readonly preset

step() { printf '\n== %s\n' "$*"; }

# Installs the photographs (170 MB) where that is allowed; data_prep.scenes says what to do where it is not.
photographs() {
    "$python" -c 'from data_prep.photographs import sources; sources()' 2>/dev/null && return
    if command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
        # shellcheck disable=SC2086
        { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $packages; } >&2 || true
    fi
}

# Small batches, many small all-reduces: on a CPU one process takes a third of the processor time of two.
tasks=1
[ "$gpus" -eq 0 ] || tasks=$ranks
readonly tasks

# A task on the encoder: its command, its module, the launcher's port, further flags.
train() {
    [ -f "$out/$1/result.json" ] ||
        "$PWD/.venv/bin/deepspeed" --num_gpus "$tasks" --master_port "$3" --module "fasthpm.dense.$2" "$out" \
            --data_path "$data" "${@:4}"
}

# Fewer updates than detection's recipe has: ten minutes are for everything.
detect() { train detect detection 29602 --steps 240; }

# On a CPU one core is used well by a task, and two badly: both at once, each on its half of the cores. What detection
# says goes into a file.
both() {
    local log=$out/detection.log share=$(($(nproc) / 2))
    export OMP_NUM_THREADS=$((share > 0 ? share : 1))
    echo "detection beside it, in $log"
    set -m  # a process group of its own, so that it ends as a whole
    detect >>"$log" 2>&1 &
    set +m
    readonly other=$!
    trap 'kill -INT -- "-$other" 2>/dev/null; wait "$other" || true' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    train segment segmentation 29601
    echo "detection goes on"
    wait "$other" || { tail -n 20 "$log" >&2; exit 1; }
    trap - EXIT INT TERM
}

step "1/3 garments on photographs, with masks and boxes"
if [ ! -f "$data/classes.txt" ]; then
    photographs
    "$python" -m data_prep.scenes "$data" --number 8000 --val_number 300 --size 96 --objects 2 5
fi
[ -f "$data/train_set.beton" ] ||
    "$python" -m data_prep.images "$data/train.txt" "$data/train_set.beton" --write_mode raw --classes "$data/classes.txt"

step "2/3 HPM pretraining on $ranks DeepSpeed ranks"
if [ ! -f "$out/report.md" ]; then
    "$PWD/.venv/bin/deepspeed" --num_gpus "$ranks" --module fasthpm.pretrain --recipe hpm_dense_demo \
        --data_path "$data/train_set.beton" --output_dir "$out" --deepspeed_config "$preset"
fi

step "3/3 segmentation: UPerNet, and detection: Mask R-CNN"
if [ "$gpus" -eq 0 ]; then
    both
else
    train segment segmentation 29601
    detect
fi

figure() { "$python" -c "import json, sys; print(f'{json.load(open(sys.argv[1]))[sys.argv[2]]:.1f} %')" "$@"; }
cat <<END

The teacher's difficulty: $(sed -n 's/^Difficulty: //p' "$out/report.md")
Segmentation: mIoU $(figure "$out/segment/result.json" miou)
Detection: AP of masks $(figure "$out/detect/result.json" mask_ap), of boxes $(figure "$out/detect/result.json" box_ap)

Done. Look at
  pictures     $out/segment/pictures.png and $out/detect/pictures.png: image, truth, prediction
  classes      $out/segment/result.md and $out/detect/result.md
  TensorBoard  .venv/bin/tensorboard --host 127.0.0.1 --logdir $out
  from scratch .venv/bin/fasthpm segment $out --data_path $data --from_scratch
END
