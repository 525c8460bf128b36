#!/usr/bin/env bash
# Make .venv and install graft into it: `bash launch/install.sh [EXTRA]`, EXTRA one of setup.cfg's (default: all).
# About 2 minutes and 4 GB of disk the first time, under a second when nothing changed. vLLM wants a PyTorch of its own, and so an
# environment of its own: `GRAFT_VENV=.venv-vllm bash launch/install.sh vllm`, on the machine whose GPU serves (Python 3.11 or 3.12, 12 GB of disk).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-all}"
venv="${GRAFT_VENV:-.venv}"
if [ -n "${GRAFT_INSTALLED:-}" ]; then exit 0; fi # an environment that was made otherwise: modules, a container
stamp="$venv/.graft-$extra"
want="$(cat setup.cfg pyproject.toml launch/constraints.txt launch/install.sh | sha256sum) $PWD"
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exit 0; fi

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "graft needs Python 3.11 or newer, $python is $("$python" -V): set PYTHON" >&2; exit 2; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --constraint launch/constraints.txt "$@"; }
echo "installing graft[$extra] into $venv (about 2 minutes)"
if [ "$extra" = vllm ]; then
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --editable ".[vllm]"
    echo "$want" >"$stamp"
    exit 0
fi
# torch first: DeepSpeed's build looks for it, and any later range must find it there
pip torch setuptools wheel
DS_BUILD_OPS=0 pip --no-build-isolation deepspeed
pip --no-build-isolation --editable ".[$extra]"
# chat templates and a real tokenizer that tests read as files; what these packages depend on is not wanted
if [ "$extra" = test ]; then pip --no-deps trl mistral-common; fi
echo "$want" >"$stamp"
