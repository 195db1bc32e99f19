#!/usr/bin/env bash
# Part of studies/beyond_pico.sh: the recipe (studies/yaml_configs/beyond/distill.yaml) with one thing changed at a time. Seed 0, 64 held-out windows.
# shellcheck source=studies/beyond/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

factor() { # name, settings
    distilled "$out/seed_0/factors/$1" student="$out/seed_0/inits/ols-long" data.validation_sequences=64 "${@:2}"
}

mixed() { # weight, loss beside forward KL, share of the steps that it takes part in
    echo "loss={method: mixture, terms: [{weight: 1.0, loss: {method: forward_kl}}, {weight: $1, loss: {method: $2}, until: ${3:-null}}]}"
}

reconstructed_neurons 0
beside factor recipe
beside factor cosine schedule.style=cosine schedule.final=0.02
beside factor warmup_0.01 schedule.warmup=0.01
beside factor adamw_5e-4 optim.lr=5e-4
beside factor hidden_0.1 "$(mixed 0.1 hidden_state)"
beside factor hidden_1 "$(mixed 1.0 hidden_state)"
beside factor hidden_0.3_early "$(mixed 0.3 hidden_state 0.3)"
beside factor hidden_1_early "$(mixed 1.0 hidden_state 0.3)"
beside factor next_token "$(mixed 0.1 cross_entropy)"
beside factor temperature_2 loss.temperature=2.0
beside factor routing_8 teacher.routing.active=8
beside factor momentum_0.9 optim.muon.momentum=0.9
beside factor no_decay optim.weight_decay=0
beside factor batch_2 batch.micro=2 batch.global=2 train.steps=1200 optim.muon.lr=1e-3 optim.lr=7e-4
finish
