#!/bin/sh
# Makes the virtual environment of a checkout: setup-venv.sh FOLDER
# Finds a Python of 3.11 or newer, brings in what a bare Debian or Ubuntu lacks (as root) or says what to install.
set -eu

venv=${1:?usage: setup-venv.sh FOLDER}
packages="python3 python3-venv python3-dev gcc libc6-dev"

suits() {
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    # PYTHON of the caller is an order, not a first guess.
    for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if suits "$name"; then
            echo "$name"
            return 0
        fi
    done
    return 1
}

# One word for each thing that is not there.
missing() {
    if python=$(find_python); then
        "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "venv"
        "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || echo "Python.h"
    else
        echo "python>=3.11"
    fi
    command -v gcc >/dev/null 2>&1 || echo "gcc"
    # gcc without the C library's headers is what a minimal install leaves behind.
    echo '#include <stdio.h>' | gcc -E - >/dev/null 2>&1 || echo "libc-headers"
}

lacks=$(missing | tr '\n' ' ')
if [ -n "$lacks" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "missing: $lacks- installing $packages"
    apt-get update -q
    # shellcheck disable=SC2086  # a list of words
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $packages
    lacks=$(missing | tr '\n' ' ')
fi
if [ -n "$lacks" ]; then
    echo "missing: $lacks" >&2
    echo "run: sudo apt-get install $packages   (or name another Python: make PYTHON=...)" >&2
    exit 1
fi

python=$(find_python)
# A half-made environment, or one of a Python that is gone, is made anew.
if ! suits "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
