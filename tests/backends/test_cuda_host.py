"""Test the machine that runs CUDA kernels on the CPU (tests/cuda_host), and the kernels on it.

First the checkers: each seeded bug of bugs.cu must be found, and its correct kernels must pass. Then the
shipped kernels: no race, no access outside of an array, no undefined behaviour, and bitwise the same results
for every order of threads.
"""

import re

import pytest
from cuda_host import CHECKED, HOST, OPTIMIZED, ROW_KERNELS, SANITIZED, Run, needs_host, program, run

pytestmark = needs_host

CHECKER_STATUS = 67


def bugs(flags, *arguments: str, **variables: str) -> Run:
    return run(program("bugs", [HOST / "bugs.cu"], flags), *arguments, **variables)


# ----------------------------------------------------------------- the checkers find seeded bugs

BY_CHECKER = {
    "bad_missing_syncthreads": "race in shared memory",
    "bad_missing_syncwarp": "race in shared memory",
    "bad_syncwarp_across_warps": "race in shared memory",
    "bad_shuffle_as_barrier": "race in shared memory",
    "bad_write_over_a_read": "a write over a read",
    "bad_plain_add": "race in device memory",
    "bad_last_block_without_fence": "race in device memory",
    "bad_blocks_share_a_place": "two writes",
    "bad_cluster_without_sync": "race in shared memory",
    "bad_bulk_without_wait": "bulk copy",
    "bad_bulk_over_a_read": "bulk copy",
    "bad_bulk_outside": "out of bounds: 16 bytes read outside of a device array",
    "bad_read_behind": "out of bounds: 4 bytes read outside of a device array",
    "bad_write_behind": "out of bounds: 4 bytes written outside of a device array",
    "bad_shared_overrun": "outside of a static shared array",
    "bad_dynamic_shared_overrun": "outside of a dynamic shared array",
}
BY_MACHINE = {
    "bad_cluster_block_leaves": "shared memory of a block that has ended",
    "bad_bulk_awaits_too_much": "deadlock",
    "bad_bulk_bytes": "multiples of 16",
    "bad_bulk_address": "multiples of 16",
    "bad_misaligned_vector": "a misaligned vector access",
    "bad_divergent_barrier": "__syncthreads() of a block of which threads have ended",
    "bad_missing_lanes": "deadlock",
    "bad_lane_outside_its_mask": "not in its own warp mask",
    "bad_absent_lane": "a lane that takes no part",
}
BY_SANITIZER = {
    "bad_bulk_outside": "heap-buffer-overflow",
    "bad_read_behind": "heap-buffer-overflow",
    "bad_write_behind": "heap-buffer-overflow",
    "bad_shared_overrun": "use-after-poison",
    "bad_dynamic_shared_overrun": "heap-buffer-overflow",
}
BY_RESULT = ("bad_uninitialised_shared", "bad_async_copy_without_wait", "bad_bulk_without_wait")
CORRECT = (
    "ok_syncthreads",
    "ok_syncwarp",
    "ok_atomic_add",
    "ok_last_block",
    "ok_cluster_exchange",
    "ok_bulk",
    "ok_async_copy",
)


@pytest.mark.parametrize("name", BY_CHECKER)
def test_the_checker_finds(name: str):
    done = bugs(CHECKED, name)
    assert done.status == CHECKER_STATUS and BY_CHECKER[name] in done.err, done.err
    assert "bugs.cu:" in done.err or "asynchronous copy" in done.err


@pytest.mark.parametrize("name", BY_MACHINE)
def test_the_machine_stops_at(name: str):
    done = bugs(OPTIMIZED, name)
    assert done.status < 0 and BY_MACHINE[name] in done.err, done.err
    assert "thread" in done.err and "block" in done.err


@pytest.mark.parametrize("name", BY_SANITIZER)
def test_the_sanitizer_finds(name: str):
    done = bugs(SANITIZED, name)
    assert done.status != 0 and BY_SANITIZER[name] in done.err, done.err


@pytest.mark.parametrize("name", BY_RESULT)
def test_what_was_never_written_is_nan(name: str):
    assert "nan" in bugs(OPTIMIZED, name).out


@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels_pass(name: str):
    results = {bugs(flags, name).out for flags in (OPTIMIZED, SANITIZED, CHECKED)}
    results |= {bugs(CHECKED, name, TOKFUSE_HOST_SEED=str(seed)).out for seed in (1, 2, 3)}
    assert len(results) == 1 and "cudaSuccess" in results.pop()
    assert bugs(CHECKED, name).status == 0


def test_every_seeded_bug_is_asked_for():
    text = (HOST / "bugs.cu").read_text()
    kernels = set(re.findall(r"__global__ void (\w+)\(", text))
    asked = {*BY_CHECKER, *BY_MACHINE, *BY_SANITIZER, *BY_RESULT, *CORRECT}
    asked |= {"bad_order_of_threads", "slow_stride", "fast_stride", "slow_banks", "half_static"}
    assert kernels == asked


def test_a_sum_in_the_order_of_threads_changes_with_the_order():
    orders = {bugs(OPTIMIZED, "bad_order_of_threads", TOKFUSE_HOST_SEED=str(i)).out for i in range(1, 5)}
    assert len(orders) > 1
    same = {bugs(OPTIMIZED, "bad_order_of_threads", TOKFUSE_HOST_SEED="7").out for _ in range(2)}
    assert len(same) == 1


def traffic(report: str) -> dict[str, float]:
    """Return "device load 16 bytes rows.cuh:12" -> the ratio to the smallest number of sectors or wavefronts."""
    lines = re.findall(r"^  (\w+ \w+ +\d+ bytes \S+) +\d+ requests, ([\d.]+) of", report, re.M)
    return {re.sub(" +", " ", place): float(times) for place, times in lines}


def test_strides_and_bank_conflicts_are_counted():
    def worst(name: str, kind: str) -> float:
        report = traffic(bugs(CHECKED, name).err)
        return max(times for place, times in report.items() if place.startswith(kind))

    assert worst("slow_stride", "device load 4") == 8.0
    assert worst("fast_stride", "device load 4") == 1.0
    assert worst("slow_banks", "shared load 4") == 32.0
    assert worst("ok_syncthreads", "shared load 4") == 1.0


def test_an_impossible_launch_is_an_error():
    done = bugs(OPTIMIZED, "bad_launch_of_a_cluster")
    assert done.status == 1 and "cudaErrorInvalidConfiguration" in done.out
    assert bugs(OPTIMIZED, "ok_cluster_exchange", TOKFUSE_HOST_ARCH="80").status == 1


def test_an_instruction_that_the_loaded_code_lacks_stops_the_run():
    """A newer device runs the code of an older architecture if it has no other."""
    for device, built in (("90", "80"), ("103", "80,90a,100a")):
        done = bugs(OPTIMIZED, "ok_cluster_exchange", TOKFUSE_HOST_ARCH=device, TOKFUSE_HOST_CODE=built)
        assert done.status < 0 and "an instruction that the loaded code does not have" in done.err, done.err
    assert bugs(OPTIMIZED, "ok_cluster_exchange", TOKFUSE_HOST_ARCH="103", TOKFUSE_HOST_CODE="100").status == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad_shared_without_asking", "more than 48 KiB of static and dynamic shared memory"),
        ("bad_shared_lowered", "the shared memory of a kernel was lowered"),
    ],
)
def test_limits_of_shared_memory_stop_the_run(name: str, message: str):
    done = bugs(OPTIMIZED, name)
    assert done.status < 0 and message in done.err, done.err


# ------------------------------------------------------------------------------ the shipped kernels


def rows(flags, *arguments: str, **variables: str) -> Run:
    main = program("rows", [*ROW_KERNELS, HOST / "rows_main.cpp"], flags)
    return run(main, *arguments, **variables)


@pytest.mark.parametrize("arch", ["80", "90"])
def test_row_kernels_have_no_race_and_stay_inside_their_arrays(arch: str):
    # One processor: its block processes all rows, so that buffers are used again.
    done = rows(CHECKED, TOKFUSE_HOST_ARCH=arch, TOKFUSE_HOST_SEED="11", TOKFUSE_HOST_PROCESSORS="1")
    assert done.status == 0, done.err
    report = traffic(done.err)
    # Vectors of aligned rows: every sector once; shared memory without bank conflicts.
    vectors = {p: x for p, x in report.items() if re.match("device (load|store) 16 ", p)}
    shared = {p: x for p, x in report.items() if p.startswith("shared")}
    assert vectors and shared
    assert max(vectors.values()) < 1.1 and max(shared.values()) == 1.0, (vectors, shared)


def moved(op: str, size: int, vocab: int, arch: str, kernel: str) -> tuple[float, float]:
    """Return bytes read and written per unmasked row (4 of them) and per row (5), divided by `vocab`."""
    done = rows(CHECKED, op, str(size), str(vocab), TOKFUSE_HOST_ARCH=arch, TOKFUSE_HOST_PROCESSORS="1")
    assert done.status == 0, done.err
    found = re.findall(rf"Arguments = {{[^}}]*{kernel}.*: (\d+) bytes read, (\d+)", done.err)
    ((read, written),) = found
    return int(read) / (4 * vocab), int(written) / (5 * vocab)


# Bytes per element, at these sizes, that a row needs in addition to its logits: targets, the inputs of the
# objective, results. In the backward every block of a row reads them, so they come from a cache. logp, which
# the target's entry needs, is the fourth of these vectors.
BESIDE, BESIDE_IN_BACKWARD = 0.09, 0.53


@pytest.mark.parametrize(("size", "vocab"), [(2, 32_768), (4, 32_768), (2, 131_072), (2, 151_936), (2, 262_144)])
@pytest.mark.parametrize(("arch", "visits"), [("80", 2), ("90", 1), ("100", 1)])
def test_policy_step_reads_a_row_once_and_writes_it_once(arch, visits, size, vocab):
    """In a cluster. The portable kernel reads the row a second time, from L2."""
    op = "policy_step_" if size == 4 else "policy_step"
    read, written = moved(op, size, vocab, arch, "TokenObjective")
    assert visits * size <= read < visits * size + BESIDE
    assert size <= written < size + BESIDE


@pytest.mark.parametrize("size", [2, 4])
def test_token_stats_reads_a_row_once_and_the_backward_once_more(size: int):
    read, written = moved("token_stats", size, 32_768, "90", "TokenStatsOut")
    assert size <= read < size + BESIDE and written < BESIDE
    read, written = moved("token_stats", size, 32_768, "90", "TokenStatsGrad")
    assert size <= read < size + BESIDE_IN_BACKWARD
    assert size <= written < size + BESIDE


@pytest.mark.parametrize("arch", ["80", "90"])
def test_row_kernels_under_address_and_undefined_behaviour_sanitizers(arch: str):
    done = rows(SANITIZED, TOKFUSE_HOST_ARCH=arch)
    assert done.status == 0, done.err


@pytest.mark.parametrize("arch", ["80", "90"])
def test_row_kernels_give_the_same_bits_in_every_order_of_threads(arch: str):
    plain = rows(OPTIMIZED, TOKFUSE_HOST_ARCH=arch)
    assert plain.status == 0 and plain.out.count("cudaSuccess") > 20
    for seed in ("1", "2"):
        assert rows(OPTIMIZED, TOKFUSE_HOST_ARCH=arch, TOKFUSE_HOST_SEED=seed).out == plain.out
    # The number of processors must not matter either. It is the number of blocks that share the rows.
    assert rows(OPTIMIZED, TOKFUSE_HOST_ARCH=arch, TOKFUSE_HOST_PROCESSORS="5").out == plain.out
