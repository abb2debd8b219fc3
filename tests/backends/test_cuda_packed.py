"""Test the CUDA kernels over packed vectors with the checkers of tests/cuda_host.

No race, no access outside of an array, no undefined behaviour, and bitwise the same results for every order of
threads and number of blocks. The tests of each op compare their values (`cuda_host`).
"""

import re
from pathlib import Path

import pytest
from cuda_host import (
    CHECKED,
    CUDA,
    HOST,
    OPTIMIZED,
    PACKED_KERNELS,
    ROW_KERNELS,
    SANITIZED,
    Run,
    needs_host,
    program,
    run,
)

pytestmark = needs_host


def packed(flags: tuple[str, ...], **variables: str) -> Run:
    return run(program("packed", [*PACKED_KERNELS, HOST / "packed_main.cpp"], flags), **variables)


@pytest.mark.parametrize("file", sorted(CUDA.glob("*.cu")), ids=lambda file: file.stem)
def test_every_kernel_file_is_run_by_one_of_the_two_programs(file: Path):
    launchers = re.findall(r"^cudaError_t (\w+)\(", file.read_text(), re.M)
    main = "rows_main.cpp" if file in ROW_KERNELS else "packed_main.cpp"
    called = set(re.findall(r"\b(\w+)\(", (HOST / main).read_text()))
    assert called & set(launchers), f"{main} calls none of {', '.join(launchers)}"


@pytest.mark.parametrize("arch", ["80", "90"])
def test_no_race_and_no_access_outside_of_an_array(arch: str):
    done = packed(CHECKED, TOKFUSE_HOST_ARCH=arch, TOKFUSE_HOST_SEED="11")
    assert done.status == 0, done.err


@pytest.mark.parametrize("arch", ["80", "90"])
def test_address_and_undefined_behaviour_sanitizers(arch: str):
    done = packed(SANITIZED, TOKFUSE_HOST_ARCH=arch)
    assert done.status == 0, done.err


def test_the_same_bits_in_every_order_of_threads_and_by_any_number_of_blocks():
    plain = packed(OPTIMIZED)
    assert plain.status == 0 and plain.out.count("cudaSuccess") > 20
    for seed in ("1", "2"):
        assert packed(OPTIMIZED, TOKFUSE_HOST_SEED=seed).out == plain.out
    for processors in ("1", "4"):
        assert packed(OPTIMIZED, TOKFUSE_HOST_PROCESSORS=processors).out == plain.out
    assert packed(OPTIMIZED, TOKFUSE_HOST_ARCH="80").out == plain.out
