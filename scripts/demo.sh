#!/usr/bin/env bash
# The demo behind `make demo`: Fashion-MNIST → FFCV → HPM on DeepSpeed ranks → k-NN → report.
#     DATA=data/fashion_mnist OUT=runs/demo RANKS=2     change where things are and how many processes train
# A second run finds everything done and only reports; a killed one goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly data=${DATA:-data/fashion_mnist} out=${OUT:-runs/demo}
readonly python=$PWD/.venv/bin/python fasthpm=$PWD/.venv/bin/fasthpm
export PYTHONWARNINGS=ignore TQDM_MININTERVAL=${TQDM_MININTERVAL:-1}

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
readonly ranks=${RANKS:-$([ "$gpus" -gt 0 ] && echo "$((gpus < 2 ? gpus : 2))" || echo 2)}

# A CPU without bf16 instructions emulates them, many times slower than float32.
preset=zero1_bf16
[ "$gpus" -gt 0 ] || "$python" -c 'from fasthpm.machine import cpu_has_bf16 as fast; exit(not fast())' || preset=zero1_fp32
readonly preset

step() { printf '\n== %s\n' "$*"; }

# Runs the k-NN probes over all ranks, unless their results are newer than the weights.
probe() {
    [ "$out/knn_student_mean.json" -nt "$out/encoder.safetensors" ] && return
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m fasthpm knn "$out" \
        --train_path "$data/train.beton" --val_path "$data/val.beton" --weights untrained student --pool mean \
        --bank_size 10000 0
}

step "1/4 Fashion-MNIST as FFCV files"
"$python" -m data_prep.fashion_mnist "$data"

step "2/4 HPM pretraining on $ranks DeepSpeed ranks"
if [ ! -f "$out/report.md" ]; then
    "$PWD/.venv/bin/deepspeed" --num_gpus "$ranks" --module fasthpm.pretrain --recipe hpm_demo \
        --data_path "$data/train.beton" --output_dir "$out" --deepspeed_config "$preset"
fi

step "3/4 k-NN: the encoder before and after"
probe

step "4/4 report"
"$fasthpm" report "$out"
cat <<END

The teacher's difficulty: $(sed -n 's/^Difficulty: //p' "$out/report.md")

Done. Look at
  checkpoint   $(printf '%s\n' "$out"/checkpoints/step-* | tail -n 1)
  encoder      $out/encoder.safetensors (loads into timm)
  TensorBoard  .venv/bin/tensorboard --host 127.0.0.1 --logdir $out/tensorboard
  report       $out/report.md
  picture      $(printf '%s\n' "$out"/panels/*.png | tail -n 1)
END
