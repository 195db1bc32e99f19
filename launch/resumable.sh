#!/usr/bin/env bash
# Sourced by scripts that are started again after a stop: finished outputs are kept, all else is done or continued.

unless_there() { # output that appears when it is complete, command...
    if [[ -e $1 ]]; then
        echo "kept: $1" >&2
    else
        "${@:2}"
    fi
}

unless_trained() { # output of distill, command...
    if grep -qs '"status": "finished"' "$1/moe2dense.json"; then
        echo "kept: $1" >&2
    else
        "${@:2}"
    fi
}
