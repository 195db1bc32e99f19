#!/usr/bin/env bash
# Part of studies/beyond_pico.sh: `auto` against a sweep of the very same plans, and with plans of neurons beside them.
# shellcheck source=studies/beyond/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

sources=("source=$moe" "statistics=$out/seed_0/statistics" device=cpu)
text=("data.path=$tokens/heldout" data.sequence_length=256 data.sequences=256)
refit_text="refit_data={path: $tokens/distill, sequence_length: 256, sequences: 128, seed: 0}"

swept() { # part of the sweep
    unless_trained "$out/auto/sweep" $moe2dense sweep "${sources[@]}" "${text[@]}" output="$out/auto/sweep" "$refit_text" \
        grid="{refit: [{mode: parallel}, {mode: sequential}]}" slice="$1"
}

searched() { # name, settings
    unless_there "$out/auto/$1" $moe2dense auto "${sources[@]}" "${text[@]}" output="$out/auto/$1" "$refit_text" "${@:2}"
}

statistics 0
beside swept 1/2
beside swept 2/2
finish
beside searched experts select=[]
beside searched neurons reconstruct="$reconstruction"
finish
