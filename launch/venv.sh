#!/usr/bin/env bash
# Makes .venv with PYTHON or, without it, the newest Python 3.11 to 3.13 that runs here, and says which. `make` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
VERSIONS="3.13 3.12 3.11"

stop() { printf 'found:    %s\nexpected: %s\ndo:       %s\n' "$@" >&2; exit 2; }
# A command on PATH may be there and not run, such as pyenv's for a version that is not active.
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null; }
known() { [[ " $VERSIONS " == *" $1 "* ]]; }

if [[ -e .venv/bin/python || -L .venv/bin/python ]]; then
    has=$(version .venv/bin/python) || stop ".venv, whose Python does not run" "a .venv that works" "rm -r .venv, then make again"
    known "$has" || stop ".venv with Python $has" "Python 3.11, 3.12 or 3.13" "rm -r .venv, then make again"
    if [[ -n ${PYTHON:-} ]]; then
        asked=$(version "$PYTHON") || stop "PYTHON=$PYTHON, which does not run" "a Python 3.11, 3.12 or 3.13" "name another, or none"
        [[ $asked == "$has" ]] || stop ".venv with Python $has, and PYTHON=$PYTHON, which is $asked" "one of them" "rm -r .venv, or leave PYTHON out"
    fi
    # A set-up that was interrupted may have left a .venv without pip.
    .venv/bin/python -m pip --version > /dev/null 2>&1 || stop ".venv without pip" "a .venv that works" "rm -r .venv, then make again"
    exit 0
fi

python=${PYTHON:-}
if [[ -z $python ]]; then
    for minor in $VERSIONS; do
        [[ -n $python ]] || ! version "python$minor" > /dev/null || python=python$minor
    done
    for other in python3 python; do
        [[ -n $python ]] || ! known "$(version "$other" || true)" || python=$other
    done
    [[ -n $python ]] || stop "no Python 3.11, 3.12 or 3.13 on PATH (python3 is $(version python3 || echo absent))" "one of them" \
        "apt-get install python3 python3-venv (Debian 12 and later, Ubuntu 24.04 and later), or name one: make PYTHON=..."
fi
has=$(version "$python") || stop "PYTHON=$python, which does not run" "a Python 3.11, 3.12 or 3.13" "name another, or none"
known "$has" || stop "PYTHON=$python, which is Python $has" "Python 3.11, 3.12 or 3.13" "name another, or none"
"$python" -c 'import venv, ensurepip' 2> /dev/null \
    || stop "$python ($has) without venv" "Python's modules venv and ensurepip" "apt-get install python$has-venv (Debian, Ubuntu)"
printf 'Python %s (%s) in .venv\n' "$("$python" -c 'import platform; print(platform.python_version())')" "$(command -v "$python")"
trap 'rm -rf .venv' ERR INT TERM
"$python" -m venv .venv
