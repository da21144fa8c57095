#!/usr/bin/env bash
# Runs the short set of tests on each Python that pyproject.toml names and this machine has,
# and says which ran. Each Python gets an environment of its own, `.venv-3.12` say; the one
# of `.venv` uses that, and is passed over where DEFAULT_TESTS_RAN says that it ran more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Prints the first interpreter of a version that can make an environment. Running it is the
# only proof: pyenv has commands for versions that are not active.
find_python() {
    local python candidates
    mapfile -t candidates < <(type -ap "python$1")
    for python in "${candidates[@]}" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if [[ -x $python && $(version "$python" ", ensurepip, venv") == "$1" ]]; then
            echo "$python"
            return
        fi
    done
}

version() {
    "$1" -c "import sys${2:-}; print('{}.{}'.format(*sys.version_info))" 2>/dev/null || true
}

mapfile -t versions < <(sed -nE 's/.*Python :: (3\.[0-9]+)".*/\1/p' pyproject.toml)
active=$(version .venv/bin/python)
results=() status=0
for version in "${versions[@]}"; do
    python=$(find_python "$version")
    environment=.venv-$version
    if [[ $version == "$active" && -n ${DEFAULT_TESTS_RAN:-} ]]; then
        results+=("Python $version: ran the default tests, which hold the short set")
        continue
    fi
    if [[ $version == "$active" ]]; then
        python=.venv/bin/python environment=.venv
    fi
    if [[ -z $python ]]; then
        results+=("Python $version: not found")
        continue
    fi
    echo "-- Python $version: $python"
    if make --no-print-directory test-short VENV="$environment" PYTHON="$python"; then
        results+=("Python $version: passed ($python)")
    else
        results+=("Python $version: FAILED ($python)")
        status=1
    fi
done
printf '%s\n' "${results[@]}"
exit "$status"
