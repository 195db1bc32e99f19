#!/usr/bin/env bash
# The first thing to run on a GPU machine, five minutes on one H100: doctor, parity of Transformer Engine's layers against the local ones,
# the kernels that ran, and short distillations of examples/pico_moe on one GPU (with FP8 where it has it) and, with two, in TP2, PP2, EP2.
# A table with PASS or FAIL at the end and in $OUT/report.txt; exit code 0 passed, 1 failed, 2 no GPU.
#   launch/gpu_smoke.sh          OUT=out/gpu_smoke PYTHON=.venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo "gpu_smoke: nvidia-smi lists no GPU, nothing was started; the CPU path is covered by make test" >&2
    exit 2
fi
exec "$PYTHON" -W ignore -m megatron_moe2dense.operations.smoke "${OUT:-out/gpu_smoke}"
