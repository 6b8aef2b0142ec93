#!/usr/bin/env bash
# Slurm: resolve the configuration now, keep it in the run's folder, and submit a job that trains with it.
#
#   launch/slurm.sh [sbatch options] -- run.name=NAME [overrides ...]
#   launch/slurm.sh --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 24:00:00 -- run.name=big model=olmoe_1b7b
#
# One task is one worker, of one GPU. What is edited while the job waits does not change it.
set -euo pipefail

options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
if (($# < 2)) || [[ " $* " != *" run.name="* ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
shift
bin=""
here=$(cd "$(dirname "$0")/.." && pwd)
if [[ -x "$here/.venv/bin/python" ]]; then bin="$here/.venv/bin/"; fi

folder=$("${bin}python" -m moetrain config --keep "$@")
mkdir -p "$folder/slurm"
sbatch "${options[@]}" --job-name "${folder##*/}" --output "$folder/slurm/%j.txt" \
  "$here/launch/slurm.sbatch" "$folder/submitted.yaml" "${bin}python"
