#!/usr/bin/env bash
# The demo behind `make video_demo`: moving garments as video files → prepared set → HPM through DALI → k-NN → report.
#     DATA=data/moving_fashion OUT=runs/video_demo RANKS=2    change where things are and how many processes train
# A second run finds everything done and only reports; a killed one goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly data=${DATA:-data/moving_fashion} out=${OUT:-runs/video_demo}
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

step "1/4 moving garments as video files, prepared"
"$python" -m data_prep.moving_fashion "$data"

step "2/4 HPM pretraining on $ranks DeepSpeed ranks"
if [ ! -f "$out/report.md" ]; then
    "$PWD/.venv/bin/deepspeed" --num_gpus "$ranks" --module fasthpm.pretrain --recipe hpm_video_demo \
        --data_path "$data/train" --output_dir "$out" --deepspeed_config "$preset"
fi

step "3/4 k-NN on classes of motion: the encoder before and after"
if [ ! "$out/knn_student_mean.json" -nt "$out/model.safetensors" ]; then
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m fasthpm knn "$out" \
        --train_path "$data/train" --val_path "$data/val" --weights untrained student
fi

step "4/4 pictures and report"
"$fasthpm" visualize "$out" --data_path "$data/val" --num_images 4 -o "$out/clips.gif"
"$fasthpm" report "$out"
cat <<END

The teacher's difficulty: $(sed -n 's/^Difficulty: //p' "$out/report.md")

Done. Look at
  checkpoint   $(printf '%s\n' "$out"/checkpoints/step-* | tail -n 1)
  animation    $out/clips.gif
  TensorBoard  .venv/bin/tensorboard --host 127.0.0.1 --logdir $out/tensorboard
  report       $out/report.md
END
