#!/usr/bin/env bash
# Sourced by scripts that are started again after a stop: finished outputs are kept, all else is done or continued.

unless_there() { # output that appears when it is complete, command...
    if [[ -e $1 ]]; then
        echo "kept: $1" >&2
    else
        "${@:2}"
    fi
}

trained() { # output of distill, or of a sweep: has it come to its end?
    grep -qs '"status": "finished"' "$1/moe2dense.json"
}

unless_trained() { # output of distill, command...
    if trained "$1"; then
        echo "kept: $1" >&2
    else
        "${@:2}"
    fi
}

ended() { # output of distill: fails, and says so, where the run was asked to stop before its last step
    if [[ -e $1/moe2dense.json ]] && ! trained "$1"; then
        echo "stopped before its end: $1; the same command goes on" >&2
        return 1
    fi
}

await() { # process that this shell started; returns its status, whatever signals come meanwhile
    while kill -0 "$1" 2> /dev/null; do
        wait "$1" || true
    done
    wait "$1"
}
