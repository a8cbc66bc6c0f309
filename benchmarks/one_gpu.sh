#!/usr/bin/env bash
# Measures FLUX.2 klein 4B and Qwen3-VL 8B with random weights on one large GPU (H200, H100, A100 with 80 GB): images of
# 1024 x 1024 with 0 to 7 references, replies, and training steps. It takes at most 10 minutes and writes the table of
# docs/results/gpus.md.
#
#     benchmarks/one_gpu.sh            # needs a GPU; PYTHON=... chooses the interpreter
#     benchmarks/one_gpu.sh --small    # small models on any device: tries the script, and changes no document
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
results=${RESULTS:-$(mktemp -d)/results.jsonl}
small=()
write=(--write docs/results/gpus.md)
if [[ ${1:-} == --small ]]; then
    small=(--small)
    write=()
elif [[ $# -gt 0 ]]; then
    echo "one_gpu.sh: unknown option $1; there is only --small" >&2
    exit 2
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95} PYTHONPATH=.

# Each group runs in a process of its own, so that one that fails or takes too long does not take the others with it.
limit=570
for group in sampling:270 decoding:120 lora:120 nft:150 sft:150; do
    name=${group%:*}
    left=$((limit - SECONDS))
    allowed=$((left < ${group#*:} ? left : ${group#*:}))
    if ((allowed < 15)); then
        "$python" benchmarks/one_gpu.py --results "$results" --failed "$name" "the 10 minutes were over"
        continue
    fi
    code=0
    timeout "$allowed" "$python" benchmarks/one_gpu.py --measure "$name" --results "$results" "${small[@]}" || code=$?
    if ((code == 124)); then
        "$python" benchmarks/one_gpu.py --results "$results" --failed "$name" "stopped after $allowed s"
    elif ((code != 0)); then
        "$python" benchmarks/one_gpu.py --results "$results" --failed "$name" "ended with exit code $code"
    fi
done
"$python" benchmarks/one_gpu.py --results "$results" "${write[@]}"
echo "results: $results"
