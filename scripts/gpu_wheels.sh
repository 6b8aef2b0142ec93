#!/usr/bin/env bash
# Wheels of what moetrain needs and a bare GPU host lacks (it has PyTorch, numba, tokenizers, safetensors, rich and
# matplotlib, and no network): scripts/gpu_check.sh installs them there. For x86-64 Linux; 4 MB.
#   scripts/gpu_wheels.sh [FOLDER [PYTHON_VERSION]]          default: .whl and 3.12, the version of that host's Python
#   PYTHON=.venv/bin/python scripts/gpu_wheels.sh            with that Python's pip
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
folder=${1:-.whl}
version=${2:-3.12}

mkdir -p "$folder"
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$folder" antlr4-python3-runtime==4.9.3 # hydra's; there is no wheel
"$PYTHON" -m pip download --quiet --dest "$folder" --find-links "$folder" --only-binary :all: --implementation cp \
    --python-version "$version" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
    'hydra-core>=1.3.2' 'pydantic>=2.8'
ls -l "$folder"
