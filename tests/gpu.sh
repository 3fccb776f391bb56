#!/usr/bin/env bash
# All tests and figures that need a GPU, in under ten minutes: tests/gpu.sh [WHEELS]
#
# For a machine that has torch and transformers but no network: WHEELS is a folder with the missing wheels, which are
# installed into a temporary folder. Without a GPU it rehearses on the CPU, with tiny models.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TQDM_DISABLE=1
if [ $# -gt 0 ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$1"/*.whl
  PYTHONPATH=$PWD:$work/site
fi
small=()
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "no GPU: a rehearsal on the CPU"
  export PROBING_REHEARSE=1
  small=(--small)
fi
"$python" -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
"$python" -m pytest -q -m gpu tests/test_gpu.py
"$python" -m tests.benchmarks.gpu_step "${small[@]}"
started=$SECONDS
"$python" -m probing demo --out "$work/demo"
echo "demo: $((SECONDS - started)) s"
