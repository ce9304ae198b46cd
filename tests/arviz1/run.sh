#!/usr/bin/env bash
# Checks the exporter against ArviZ 1, which needs Python 3.12, in an environment without torch.
# The environment is kept in .venv-arviz1 (or $ARVIZ1_VENV); arguments go to pytest.
# Where it cannot be had, the check is skipped, and says why.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv="${ARVIZ1_VENV:-.venv-arviz1}"

skip() {
    echo "skipped the check against ArviZ 1: $1"
    exit 0
}

# A name on the path may be a shim that cannot run: what counts is that it does.
find_python() {
    local minor version found
    for minor in 3.13 3.12; do
        if "python$minor" -c '' 2>/dev/null; then
            echo "python$minor"
            return
        fi
        version="$(pyenv versions --bare 2>/dev/null | grep "^$minor" | tail -n 1)" || true
        found="$(pyenv prefix "${version:-none}" 2>/dev/null)/bin/python" || true
        if [ -n "$version" ] && "$found" -c '' 2>/dev/null; then
            echo "$found"
            return
        fi
    done
}

if ! [ -e "$venv/.made" ]; then
    python="$(find_python)"
    [ -n "$python" ] || skip "it needs python3.12 or python3.13, and neither runs here"
    "$python" -m venv --clear "$venv" 2>/dev/null || skip "$python cannot make an environment"
    echo '*' >"$venv/.gitignore"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
        'arviz>=1' h5netcdf h5py matplotlib 'pytest>=8' || skip "its packages cannot be installed"
    touch "$venv/.made"
fi

export MPLBACKEND=Agg
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir tests/arviz1 --noconftest \
    tests/arviz1/check_exporter.py "$@"
