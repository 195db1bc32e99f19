#!/usr/bin/env bash
# Part of studies/beyond_pico.sh: KL on all held-out text over tokens, of the recipe and of DO-ACP with AdamW, at 16 and at 4 sequences a step.
# shellcheck source=studies/beyond/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

arm() { # seed, init, name, steps, settings
    distilled "$out/seed_$1/arms/$2.$3.$4" student="$out/seed_$1/inits/$2" train.steps="$4" train.seed="$1" "${@:5}"
}

read -ra seeds <<< "${SEEDS:-0 1 2}"

start() { # seed
    reconstructed_neurons "$1"
    convert "$1" do_acp statistics="$out/seed_$1/statistics" score.method=do_acp
}

for seed in "${seeds[@]}"; do beside start "$seed"; done
finish
sixteen=(batch.global=16 batch.micro=8 schedule.style=cosine schedule.final=0.02)
muon_16=("${sixteen[@]}" optim.muon.lr=6e-3 optim.lr=2e-3)
for init in do_acp energy ols; do beside arm 0 $init-reconstructed muon-16 150 "${muon_16[@]}"; done
for seed in "${seeds[@]}"; do
    for steps in 150 450; do beside arm "$seed" do_acp adamw-16 $steps "${sixteen[@]}" optim.muon=null optim.lr=4.5e-3; done
    for steps in 75 150 450; do beside arm "$seed" ols-long muon-16 $steps "${muon_16[@]}"; done
    beside arm "$seed" do_acp adamw-4 1800 optim.muon=null optim.lr=2e-3
    for steps in 300 600; do beside arm "$seed" ols-long muon-4 $steps; done
done
finish
