#!/usr/bin/env bash
# Makes .venv, or brings it up to date: the package (editable) with its demo and dev extras, at constraints.txt's versions.
# The Python is the one .python-version names (pyenv), else python3.12, else python3 where that is 3.12 or newer.
set -eEuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_right_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$(<.python-version)/bin/python" python3.12 python3; do
        if is_right_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "no Python 3.12 with venv found: install it (pyenv install $(<.python-version), or your system's python3.12" \
        "and python3.12-venv) and run this again" >&2
    return 1
}

install() { # pip, down to one line a package; all it says is in .venv/install.log
    .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt "$@" 2>&1 |
        tee -a .venv/install.log |
        sed -u -n -E -e 's/^(Collecting [^ ]+).*/  \1/p' -e 's/^Installing collected packages:.*/  Installing/p' -e '/^ERROR/p'
}

if [[ -x .venv/bin/python ]]; then
    if ! is_right_python .venv/bin/python; then
        echo ".venv has no working Python 3.12: remove it (make clean) and run this again" >&2
        exit 1
    fi
else
    python=$(find_python) || exit 1
    echo "making .venv with $python ($("$python" --version))"
    "$python" -m venv .venv
fi
echo "installing megatron-sfr and what it needs into .venv (the first time about 5 GB and a few minutes)"
: >.venv/install.log
trap 'echo "the installation failed: .venv/install.log says why" >&2' ERR
install setuptools
install --no-build-isolation -e '.[demo,dev]' # the pinned setuptools builds, so that a second call needs no network
echo "done: .venv/bin/megatron-sfr --help"
