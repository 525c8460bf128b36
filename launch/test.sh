#!/usr/bin/env bash
# The whole suite: .venv, install with the test extra, linters, types, import rules, every test, two files at a time.
# 40 to 45 minutes on two cores; --campaign adds the long runs, one at a time. Arguments go to pytest: bash launch/test.sh tests/core
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh test
bin="${GRAFT_VENV:-.venv}/bin"
"$bin/ruff" check src tests benchmarks
"$bin/ruff" format --check src tests benchmarks
"$bin/mypy"
"$bin/lint-imports" --no-logo 2>/dev/null || "$bin/lint-imports"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then # for tests/slurm, which is skipped without
  apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2 >/dev/null || echo "no SLURM here: tests/slurm is skipped"
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromedriver >/dev/null; then # for tests/serve/test_page.py, skipped without
  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null || echo "no Chromium here: tests/serve/test_page.py is skipped"
fi
if command -v shellcheck >/dev/null; then shellcheck launch/*.sh slurm/*.sh slurm/*.sbatch .ci/run; fi
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
pytest() { "$bin/python" -m pytest --dist loadfile --no-loadscope-reorder "$@"; }
case " $* " in
  "  ")
    pytest tests/e2e/test_quickstart.py # alone: it is timed
    pytest --numprocesses 2 tests --ignore tests/e2e/test_quickstart.py
    ;;
  *" --campaign "*) pytest "$@" ;;
  *) pytest --numprocesses 2 "$@" ;;
esac
