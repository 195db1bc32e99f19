#!/usr/bin/env bash
# Part of studies/beyond_pico.sh: many choices of gate and up rows, their down projections solved alike, distilled alike; some reconstructed
# first. Seed 0.
# shellcheck source=studies/beyond/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

choice() { # sequential or reconstructed, name, options
    "$1" 0 "${@:2}"
    distilled "$out/seed_0/choices/$2-$1" student="$out/seed_0/inits/$2-$1" train.steps=300
}

experts() { # sequential or reconstructed, name, options
    choice "$1" "$2" statistics="$out/seed_0/statistics" "${@:3}"
}

statistics 0
neurons 0 energy
neurons 0 ols
for score in sf pp cp reap acp do_acp random; do beside experts sequential $score score.method=$score; done
beside experts sequential mp score.method=mp scale.method=proportional
beside experts sequential d_optimal_mp score="{method: d_optimal, importance: mp}"
beside experts sequential merged score.method=sf keep=16 group="{method: weight_cluster, align: hungarian}"
for method in energy ols; do beside choice sequential $method plan="$out/seed_0/select_$method/plan.json"; done
for score in do_acp random; do beside experts reconstructed $score score.method=$score; done
for method in energy ols; do beside choice reconstructed $method plan="$out/seed_0/select_$method/plan.json"; done
finish
models=""
for dir in "$out"/seed_0/choices/*; do models+="${models:+, }$(basename "$dir"): $out/seed_0/inits/$(basename "$dir")"; done
judged "$out/choices.jsonl" "$models"
