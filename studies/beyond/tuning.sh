#!/usr/bin/env bash
# Part of studies/beyond_pico.sh: rates for both arms, at 16 and at fewer sequences a step. Seed 0, judged on 64 held-out windows.
# shellcheck source=studies/beyond/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

tune() { # init, name, steps, settings
    distilled "$out/seed_0/tune/$1.$2.$3" student="$out/seed_0/inits/$1" train.steps="$3" data.validation_sequences=64 \
        schedule.style=cosine schedule.final=0.02 "${@:4}"
}

sixteen=(batch.global=16 batch.micro=8)
adamw=(optim.muon=null)
for lr in 3e-3 6e-3 1e-2; do beside tune do_acp adamw-$lr 150 "${sixteen[@]}" "${adamw[@]}" optim.lr=$lr; done
for lr in 3e-3 6e-3; do beside tune ols-sequential adamw-$lr 150 "${sixteen[@]}" "${adamw[@]}" optim.lr=$lr; done
for lr in 3e-3 6e-3 1e-2; do beside tune ols-sequential muon-$lr 150 "${sixteen[@]}" optim.muon.lr=$lr optim.lr=3e-3; done
beside tune do_acp muon-3e-3 150 "${sixteen[@]}" optim.muon.lr=3e-3 optim.lr=3e-3
beside tune do_acp adamw-2e-3-batch4 600 "${adamw[@]}" optim.lr=2e-3
for lr in 2e-3 4.5e-3; do beside tune do_acp adamw-$lr 450 "${sixteen[@]}" "${adamw[@]}" optim.lr=$lr; done
for lr in 1e-3 2e-3 3e-3; do beside tune do_acp adamw-$lr-batch4 1800 "${adamw[@]}" optim.lr=$lr; done
beside tune do_acp adamw-2e-3-batch4-linear 1800 "${adamw[@]}" optim.lr=2e-3 schedule.style=linear schedule.final=0.0
beside tune do_acp adamw-1.4e-3-batch2 3600 "${adamw[@]}" optim.lr=1.4e-3 batch.global=2 batch.micro=2
refitted 0 ols-reconstructed-8 plan="$out/seed_0/select_ols/plan.json" refit.mode=sequential refit.reconstruct="{epochs: 8, lr: 3e-3}"
beside tune ols-reconstructed-8 adamw-3e-3 150 "${sixteen[@]}" "${adamw[@]}" optim.lr=3e-3
beside tune ols-reconstructed-8 muon-6e-3-adamw-3e-3 150 "${sixteen[@]}" optim.muon.lr=6e-3 optim.lr=3e-3
beside tune ols-reconstructed-8 muon-6e-3-adamw-3e-3-batch4 600 optim.muon.lr=6e-3 optim.lr=3e-3
refitted 0 ols-reconstructed-3e-3 plan="$out/seed_0/select_ols/plan.json" refit.mode=sequential refit.reconstruct="{epochs: 24, lr: 3e-3}"
for lr in 6e-3 3e-3 2e-3 1e-3; do
    beside tune ols-reconstructed-3e-3 muon-6e-3-adamw-$lr 150 "${sixteen[@]}" optim.muon.lr=6e-3 optim.lr=$lr
done
reconstructed_neurons 0
beside tune ols-long muon-6e-3-adamw-2e-3 150 "${sixteen[@]}" optim.muon.lr=6e-3 optim.lr=2e-3
beside tune ols-long muon-4e-3-adamw-1.5e-3-batch8 300 batch.global=8 batch.micro=8 optim.muon.lr=4e-3 optim.lr=1.5e-3
for lr in 1e-3 1.5e-3 2e-3 3e-3 4e-3; do beside tune ols-long muon-$lr-adamw-1e-3-batch4 600 optim.muon.lr=$lr optim.lr=1e-3; done
for lr in 1e-3 2e-3; do
    beside tune ols-long muon-$lr-adamw-7e-4-batch2 1200 batch.global=2 batch.micro=2 optim.muon.lr=$lr optim.lr=7e-4
done
for lr in 1e-3 2e-3; do beside tune ols-long adamw-$lr-batch4 600 "${adamw[@]}" optim.lr=$lr; done
finish
