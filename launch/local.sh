#!/usr/bin/env bash
# One host, workers started by torchrun: the same program, the same arguments as `moetrain train`.
#
#   launch/local.sh [WORKERS] [overrides ...]
#   launch/local.sh 4 model=tiny parallel.ep=2 train.steps=50
set -euo pipefail

workers=2
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  workers=$1
  shift
fi
bin=""
here=$(cd "$(dirname "$0")/.." && pwd)
if [[ -x "$here/.venv/bin/torchrun" ]]; then bin="$here/.venv/bin/"; fi

# As `moetrain train` sets them for its own workers (docs/launch.md, CPU runs).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + workers - 1) / workers))}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296:glibc.malloc.arena_max=1:glibc.malloc.top_pad=67108864}

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else every other restart waits for a store that is gone

exec "${bin}torchrun" --standalone --nproc-per-node "$workers" --max-restarts 3 -m moetrain train "$@"
