#!/usr/bin/env bash
# Everything worth knowing on one GPU, in 8 minutes, on a machine that has torch and perhaps nothing else of ours:
#
#     bench/gpu.sh OUT [FLAGS]        # FLAGS of python -m bench.gpu, as --parts steps or --rehearse (no GPU, tiny sizes)
#
# OUT receives results.json (after every part), results.md, log.txt and gpu.tar.gz with the three. Packages that this
# Python lacks are taken from the wheels that bench/gpu_pack.sh has laid into build/gpu_pack. Start it again to go on.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh OUT [FLAGS]}
shift
limit=${LIMIT:-480}
mkdir -p "$out/site"
for python in ${PYTHON:-.venv/bin/python python3 python}; do
    "$python" -c 'import torch' 2> /dev/null && break
    python=
done
[ -n "$python" ] || { echo "gpu.sh: no Python with torch (tried ${PYTHON:-.venv/bin/python, python3, python})" >&2; exit 2; }
"$python" bench/gpu_site.py build/gpu_pack/wheels "$out/site" || exit 2
export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}"

end=$(($(date +%s) + limit))
status=75
for _ in 1 2 3 4; do # again only where the process itself has died; what it was at is then left alone
    left=$((end - $(date +%s)))
    [ $status -ne 0 ] && [ $status -ne 1 ] && [ $status -ne 2 ] && [ $left -gt 10 ] || break
    "$python" -m bench.gpu "$out" --seconds "$left" "$@" 2>> "$out/log.txt" | tee -a "$out/log.txt"
    status=${PIPESTATUS[0]}
done
rm -rf "$out/site"
(cd "$out" && tar czf gpu.tar.gz $(ls results.json results.md log.txt 2> /dev/null))
echo "gpu.sh: status $status; $out/gpu.tar.gz" >&2
exit $status
