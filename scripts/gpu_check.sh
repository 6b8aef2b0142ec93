#!/usr/bin/env bash
# What one GPU can show, in one command and without a network: tests on CUDA with NCCL, the rate of the expert GEMMs,
# one MoE layer of published models on 8 virtual ranks. Results: docs/results/DEVICE/. Nothing is installed.
#   scripts/gpu_check.sh                     with the python on the path
#   PYTHON=.venv/bin/python scripts/gpu_check.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SHAPES=(gpt-oss-120b deepseek-v3 kimi-k2)

device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [ -z "$device" ]; then
    echo "error: no GPU that PyTorch of $PYTHON can use" >&2
    exit 2
fi
out="docs/results/$(tr -cs 'A-Za-z0-9\n' '-' <<<"$device")"
mkdir -p "$out"
failed=()

step() { # NAME SECONDS COMMAND...: runs it, shows and keeps what it says, goes on after a failure
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || failed+=("$name (exit code $code)")
}

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
step tests 150 "$PYTHON" -m pytest --gpu -v
step gemms 60 "$PYTHON" -m moetrain bench gpu --out "$out"
for shape in "${SHAPES[@]}"; do
    step "layer-$shape" 80 "$PYTHON" -m moetrain bench layer --virtual-ranks 8 --shape "$shape" --tokens 8192 --quick \
        --planner home makespan --out "$out/layer-$shape"
done

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "results are in $out"
