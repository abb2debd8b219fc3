#!/usr/bin/env bash
# Build, test and benchmark on a machine with a GPU. Needs no network and no virtual environment.
# PYTHON selects the interpreter (default python3). Options: tools/first_gpu_run.sh --help.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/first_gpu_run.py" "$@"
