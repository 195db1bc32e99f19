#!/usr/bin/env bash
# Held-out perplexity of the pico example's dense models before distillation: scoring x scaling at K = G, and grouping x alignment at
# K = 4 G. About ten minutes. Writes both tables into docs/method.md. Everything else is written to out/table_pico.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make -s .venv/.installed-train-plot
moe2dense=.venv/bin/moe2dense
model=examples/pico_moe/model
tokens=examples/pico_moe/tokens
out=out/table_pico

rm -rf "$out"
$moe2dense calibrate source=$model output=$out/statistics data.path=$tokens/distill data.sequence_length=256 data.sequences=512

models="MoE: $model"
convert() { # label, options
    $moe2dense convert source=$model statistics=$out/statistics output="$out/$1" "${@:2}"
    models+=", $1: $out/$1"
}
for scale in uniform proportional; do
    for score in sf pp mp cp reap acp do_acp random; do
        convert "$score-$scale" score.method=$score scale.method=$scale
    done
    convert "d_optimal_mp-$scale" "score={method: d_optimal, importance: mp}" scale.method=$scale
    for seed in 1 2; do
        convert "random_$seed-$scale" "score={method: random, seed: $seed}" scale.method=$scale
    done
done
for alpha in 0.0 0.1; do  # controls: the experts of sf at another scale, from an edited plan
    sed -z 's/"scales": \[[^]]*\]/"scales": ['"$alpha, $alpha, $alpha, $alpha"']/g' $out/sf-uniform/plan.json > "$out/alpha_$alpha.json"
    $moe2dense convert source=$model plan="$out/alpha_$alpha.json" output="$out/sf-alpha_$alpha"
    models+=", sf-alpha_$alpha: $out/sf-alpha_$alpha"
done
for align in none hungarian; do
    for group in weight_cluster output_cluster router_cluster anchor round_robin; do
        convert "$group-$align" score.method=sf keep=16 "group={method: $group, align: $align}"
    done
done

$moe2dense eval "models={$models}" output=$out/records.jsonl \
    "perplexity.data={path: $tokens/heldout, sequence_length: 256, sequences: null}"
.venv/bin/python -m studies.table_pico $out/records.jsonl docs/method.md
