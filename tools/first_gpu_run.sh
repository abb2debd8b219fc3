#!/usr/bin/env bash
# The first thing to run on a machine with a GPU; needs no network and no virtual environment.
# PYTHON names the interpreter (default python3); options: tools/first_gpu_run.sh --help.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/first_gpu_run.py" "$@"
