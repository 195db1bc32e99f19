#!/usr/bin/env bash
# Sourced by scripts that run several commands at a time: JOBS of them, 2 unless it is set.

trap 'kill $(jobs -p) 2> /dev/null || true' EXIT  # what runs beside a command that failed

started=()
beside() { # command..., in the background once fewer than JOBS are
    while (($(jobs -rp | wc -l) >= ${JOBS:-2})); do wait -n; done
    "$@" &
    started+=($!)
}

finish() { # everything started has ended well
    local pid
    for pid in "${started[@]}"; do wait "$pid"; done
    started=()
}
