#!/bin/sh
# A compiler launcher for CMake: no optimisation. Installing is under test, not speed.
exec "$@" -O0
