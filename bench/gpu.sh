#!/usr/bin/env bash
# Everything worth knowing on one GPU, in under 9 minutes, into one folder:
#
#     bench/gpu.sh OUT [DATA]        # DATA: a prepared .beton (default: drawn images)
#     TINY=1 bench/gpu.sh OUT        # the same with toy sizes, on a CPU, to see that it runs to the end
#
# Every part has a time limit of its own and may fail without the others; OUT/summary.txt says which did. All together
# end in 9 minutes: parts that no time is left for are left out, the last ones first.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh OUT [DATA]}
data=${2:-synthetic:8192}
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python
mkdir -p "$out"
: > "$out/summary.txt"
failed=0
end=$((${LIMIT:-530} - 40)) # of all but the pages

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS left=$((end - SECONDS)) status
    shift 2
    [ "$limit" -lt "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "$name: left out, no time" | tee -a "$out/summary.txt" >&2
        failed=1
        return
    fi
    echo "== $name" >&2
    timeout "$limit" "$@" > "$out/$name.txt" 2> "$out/$name.log"
    status=$?
    [ $status -eq 0 ] || failed=1
    echo "$name: status $status, $((SECONDS - begin)) s" | tee -a "$out/summary.txt" >&2
}

if [ "${TINY:-0}" = 1 ]; then
    export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    device=(--device cpu --threads 1 --rounds 1)
    step=(--size nano --batch_size 2 --rounds 1 --repeats 1 --threads 1)
    train=(--recipe debug --data_path synthetic:64 --batch_size 4 --updates 4 --rounds 1 --num_workers 1)
    part step_nano 120 "$python" -m bench.step "${step[@]}" --precision bf16 -o "$out/step_nano_bf16.json"
    part step_video 120 "$python" -m bench.step "${step[@]}" --video --precision bf16 -o "$out/step_video_nano_bf16.json"
else
    nvidia-smi > "$out/nvidia-smi.txt" 2>&1
    device=(--device cuda --rounds 5)
    train=(--data_path "$data" --batch_size 256 --updates 40 --rounds 1)
    few=(--variants mae hpm hpm_fast measured_alone measured_fast eager_mae)
    part no_sync 60 "$python" -m pytest -q tests/test_step_fast.py -k sync
    part step_base 130 "$python" -m bench.step --size base --batch_size 256 --precision bf16 --rounds 3 --repeats 5 \
        -o "$out/step_base_bf16.json"
    part step_large 100 "$python" -m bench.step --size large --batch_size 128 --precision bf16 --rounds 3 --repeats 3 \
        "${few[@]}" -o "$out/step_large_bf16.json"
    part step_video 90 "$python" -m bench.step --size base --video --batch_size 32 --precision bf16 --rounds 2 \
        --repeats 3 "${few[@]}" -o "$out/step_video_base_bf16.json"
    part step_base_compiled 150 "$python" -m bench.step --size base --batch_size 256 --precision bf16 --rounds 3 \
        --repeats 5 --compile "${few[@]}" -o "$out/step_base_compiled.json"
fi
part end_to_end 120 "$python" -m bench.end_to_end "${train[@]}" -o "$out/end_to_end.json"
part losses 60 "$python" -m bench.losses "${device[@]}" -o "$out/losses.json"
part masking 40 "$python" -m bench.masking "${device[@]}" -o "$out/masking.json"
end=$((end + 40))
part roofline 30 "$python" -m bench.roofline --results "$out"/step_*.json -o "$out/roofline.json"
part report 30 "$python" -m bench.report "$out"
cat "$out/summary.txt"
exit $failed
