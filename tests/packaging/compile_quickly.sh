#!/bin/sh
# A compiler launcher for CMake without optimisation. The tests check the installation, not the speed.
exec "$@" -O0
