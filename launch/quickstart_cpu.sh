#!/usr/bin/env bash
# The whole path on the embedded example, on two CPU cores: a really trained MoE becomes a distilled dense model.
# Run it through `make quickstart`, which installs what it needs. Everything is written to out/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=.venv/bin
moe2dense=$bin/moe2dense
configs=yaml_configs/quickstart
out=out/quickstart
# One machine, no GPU even where there is one; threads that sleep while they wait (spinning ones starve each other on a shared machine).
export GLOO_SOCKET_IFNAME=lo CUDA_VISIBLE_DEVICES="" OMP_WAIT_POLICY=passive
started=$SECONDS
say() { printf '\n[%3d s] %s\n' $((SECONDS - started)) "$*"; }

rm -rf "$out"

say "1/8 inspect: what is in the checkpoint"
$moe2dense inspect examples/pico_moe/model

say "2/8 calibrate: statistics of every expert, one layer in memory at a time"
$moe2dense calibrate $configs/calibrate.yaml

say "3/8 score: rank the experts"
$moe2dense score $configs/score.yaml

say "4/8 convert: keep 4 of 32 experts, concatenate them into one dense FFN: three ways of choosing; one of them reconstructed, layer by layer"
$moe2dense convert $configs/convert.yaml
$moe2dense convert $configs/convert.yaml output=$out/dense_sf score.method=sf
$moe2dense convert $configs/convert.yaml output=$out/dense_random score.method=random
$moe2dense convert $configs/reconstruct.yaml

say "5/8 distill: Megatron-Core student and teacher, two processes"
# A port that is free, and no name of this machine: it need not have one that resolves.
OMP_NUM_THREADS=1 $bin/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 \
    -m megatron_moe2dense distill $configs/distill.yaml

say "6/8 export: trainer checkpoint to a Hugging Face checkpoint"
$moe2dense export checkpoint=$out/distill output=$out/export

say "7/8 eval and plot"
$moe2dense eval $configs/eval.yaml
$moe2dense plot $configs/plot.yaml

say "8/8 generate: the exported model through stock transformers"
$bin/python launch/generate.py $out/export "The meaning of the word"

say "done: records, figures and models are in $out"

cat << EOF

$out/export is served as it is, in an environment that has the engine (docs/serving.md):
  vLLM             vllm serve $out/export
  transformers     transformers serve $out/export
  llama.cpp        $moe2dense export checkpoint=$out/export output=$out/gguf format=gguf quantize=Q8_0
                   llama-server -m $out/gguf/*.gguf
Whether an engine computes what stock transformers does:
  $moe2dense serve-check $out/export 'engines=[vllm,llama_cpp]' python.vllm=/path/to/the/environment/bin/python
EOF
