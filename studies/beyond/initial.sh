#!/usr/bin/env bash
# Part of studies/beyond_pico.sh: four choices, their down projections as they are, solved in either mode, and the whole FFNs trained.
# shellcheck source=studies/beyond/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

refits() { # name, options
    convert 0 "$@"
    refitted 0 "$1-parallel" "${@:2}" refit.mode=parallel
    sequential 0 "$@"
    reconstructed 0 "$@"
}

statistics 0
neurons 0 energy
neurons 0 ols
beside refits do_acp statistics="$out/seed_0/statistics" score.method=do_acp
beside refits mp statistics="$out/seed_0/statistics" score.method=mp scale.method=proportional
beside refits energy plan="$out/seed_0/select_energy/plan.json"
beside refits ols plan="$out/seed_0/select_ols/plan.json"
finish
models="moe: $moe"
for name in do_acp mp energy ols; do
    for refit in "" -parallel -sequential -reconstructed; do models+=", $name$refit: $out/seed_0/inits/$name$refit"; done
done
judged "$out/initial.jsonl" "$models"
