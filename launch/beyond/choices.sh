#!/usr/bin/env bash
# Part of launch/beyond_pico.sh: many choices of gate and up rows, their down projections solved alike, distilled alike; some reconstructed
# first. Seed 0.
# shellcheck source=launch/beyond/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

choice() { # name, options
    local name=$1 dir=$out/seed_0
    refitted 0 "$name-sequential" "${@:2}" refit.mode=sequential
    distilled "$dir/choices/$name-sequential" student="$dir/inits/$name-sequential" train.steps=300
}

experts() { # name, options
    choice "$1" statistics="$out/seed_0/statistics" "${@:2}"
}

reconstructed() { # name, options
    local name=$1-reconstructed dir=$out/seed_0
    refitted 0 "$name" "${@:2}" refit.mode=sequential refit.reconstruct="{epochs: 24, lr: 6e-3}"
    distilled "$dir/choices/$name" student="$dir/inits/$name" train.steps=300
}

statistics 0
neurons 0 energy
neurons 0 ols
for score in sf pp cp reap acp do_acp random; do beside experts $score score.method=$score; done
beside experts mp score.method=mp scale.method=proportional
beside experts d_optimal_mp score="{method: d_optimal, importance: mp}"
beside experts merged score.method=sf keep=16 group="{method: weight_cluster, align: hungarian}"
for method in energy ols; do beside choice $method plan="$out/seed_0/select_$method/plan.json"; done
for score in do_acp random; do beside reconstructed $score statistics="$out/seed_0/statistics" score.method=$score; done
for method in energy ols; do beside reconstructed $method plan="$out/seed_0/select_$method/plan.json"; done
finish
models=""
for dir in "$out"/seed_0/choices/*; do models+="${models:+, }$(basename "$dir"): $out/seed_0/inits/$(basename "$dir")"; done
judged "$out/choices.jsonl" "$models"
