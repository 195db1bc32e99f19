#!/usr/bin/env bash
# The trainer's parity, checkpoint and latent-attention tests against other versions of Megatron-Core, each unpacked beside the installed
# one and never installed (their metadata may ask for a newer Python than they need). Wheels are kept in $OUT.
#   launch/versions.sh [pytest arguments]     VERSIONS="0.17.1 0.18.2 0.19.2" OUT=out/versions
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=.venv/bin/python
OUT=${OUT:-out/versions}
[[ $# -gt 0 ]] || set -- tests/trainer/test_{family_parity,step_parity,checkpoints,latent_attention}.py
failed=""
for version in ${VERSIONS:-0.17.1 0.18.2 0.19.2}; do
    folder=$OUT/$version
    if [[ ! -d $folder/megatron ]]; then
        "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --ignore-requires-python -d "$OUT" "megatron-core==$version"
        "$PYTHON" -m zipfile -e "$OUT"/megatron_core-"$version"-*.whl "$folder"
    fi
    echo "== megatron-core $version"
    PYTHONPATH="$PWD/$folder" OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive "$PYTHON" -m pytest -q "$@" || failed+=" $version"
done
[[ -z $failed ]] || { echo "versions: failed with$failed" >&2; exit 1; }
