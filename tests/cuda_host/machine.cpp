// Runs kernels on the CPU: fibers, synchronisation of threads, shared memory, asynchronous copies.
//
// Each thread is a fiber. A scheduler resumes ready fibers in turn until each has ended or waits.
// TOKFUSE_HOST_SEED shuffles the order reproducibly. Bulk copies complete when no thread can
// continue, the latest possible time. With a seed they may also complete at once, the earliest
// possible time. Shared and device memory start as NaN. Behaviour that CUDA leaves undefined stops
// the program with the kernel, block and thread.
#include "machine.h"

#include <algorithm>
#include <cstdio>

#include "bulk.h"
#include "driver.h"
#include "fibers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tokfuse {
namespace host {

Machine machine;
Thread* current = nullptr;
Observer* observer = nullptr;

namespace {

constexpr size_t kRedZone = 32;  // between static shared objects

thread_local cudaError_t last_error = cudaSuccess;

void wait_as(State state, const char* at) {
  current->state = state;
  current->waits_at = at;
  to_scheduler();
}

// -------------------------------------------------------------------- synchronisation of threads

void release_block(Block& block) {
  if (block.alive < block.threads.size()) {
    fail("__syncthreads() of a block of which threads have ended");
  }
  block.waiting = 0;
  block.last_all = block.all;
  block.last_any = block.any;
  block.last_count = block.count;
  block.all = 1;
  block.any = block.count = 0;
  std::vector<Thread*> met;
  for (Thread& t : block.threads) {
    if (t.state != State::kAtBlock) continue;
    t.state = State::kReady;
    met.push_back(&t);
  }
  if (observer != nullptr) observer->met(met);
}

// If every lane of the mask has arrived, each lane gets all values. Ended lanes are ignored.
bool try_meet(Thread& first) {
  Block& block = *first.block;
  const unsigned base = first.in_block - first.lane;
  std::vector<Thread*> met;
  unsigned present = 0;
  for (unsigned lane = 0; lane < 32; lane++) {
    if (!(first.mask >> lane & 1) || base + lane >= block.threads.size()) continue;
    Thread& t = block.threads[base + lane];
    if (t.state == State::kDone) continue;
    if (t.state != State::kAtWarp || t.mask != first.mask || t.meeting != first.meeting) {
      return false;
    }
    present |= 1u << lane;
    met.push_back(&t);
  }
  for (Thread* t : met) {
    t->present = present;
    t->state = State::kReady;
    for (const Thread* other : met) t->received[other->lane] = other->given;
  }
  // A shuffle or a vote does not order memory.
  static const std::string kSync = "__syncwarp";
  if (observer != nullptr && kSync == met.front()->meeting) observer->met(met);
  return true;
}

void meet_warp(unsigned mask, const char* name, uint64_t value) {
  Thread& t = *current;
  if (!(mask >> t.lane & 1)) fail("a lane is not in its own warp mask");
  t.mask = mask;
  t.meeting = name;
  t.given = value;
  t.state = State::kAtWarp;
  if (!try_meet(t)) wait_as(State::kAtWarp, name);
}

// ------------------------------------------------------------------------------ running a cluster

void end_thread() {
  Thread& t = *current;
  Block& block = *t.block;
  if (!t.copies.empty()) fail("a thread ended with cp.async copies that it never waited for");
  t.state = State::kDone;
  block.alive--;
  if (block.waiting > 0 && block.waiting == block.alive) {
    fail("a thread ended while others of its block wait at __syncthreads()");
  }
  if (machine.cluster_waiting > 0) {
    fail("a thread ended while others of its cluster wait at cluster_sync()");
  }
  const unsigned base = t.in_block - t.lane;
  for (unsigned i = base; i < base + 32 && i < block.threads.size(); i++) {
    if (block.threads[i].state == State::kAtWarp) try_meet(block.threads[i]);
  }
  to_scheduler();
  fail("an ended thread was resumed");
}

const std::function<void()>* kernel_body = nullptr;

void fiber_main() {
  fiber_begins();
  (*kernel_body)();
  end_thread();
}

void make_thread(Block& block, Thread& t, unsigned i, uint3 block_index) {
  const dim3 size = machine.shape.block;
  t = Thread();
  t.block = &block;
  t.in_block = i;
  t.in_cluster = block.rank * static_cast<unsigned>(block.threads.size()) + i;
  t.lane = i % 32;
  t.place = {{i % size.x, i / size.x % size.y, i / (size.x * size.y)},
             block_index,
             size,
             machine.shape.grid};
  t.stack = stack_of(t.in_cluster);
  t.stack_pointer = fiber_of(t.stack, &fiber_main);
}

void make_block(Block& block, unsigned rank, uint3 index) {
  const Shape& shape = machine.shape;
  block = Block();
  block.rank = rank;
  block.threads.resize(shape.block.x * shape.block.y * shape.block.z);
  block.alive = static_cast<unsigned>(block.threads.size());
  block.statics = static_cast<unsigned char*>(aligned_alloc(1024, kStaticShared));
  memset(block.statics, 0xff, kStaticShared);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(block.statics, kStaticShared);
#endif
  if (shape.shared > 0) {
    // The checker or AddressSanitizer guards the memory after the end.
    const size_t bytes = shape.shared + (observer != nullptr ? kGuard : 0);
    void* at = nullptr;
    if (posix_memalign(&at, 1024, bytes) != 0) fail("no memory for shared memory");
    memset(at, 0xff, bytes);
    block.dynamic = static_cast<unsigned char*>(at);
  }
  for (unsigned i = 0; i < block.threads.size(); i++) {
    make_thread(block, block.threads[i], i, index);
  }
}

void free_block(Block& block) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(block.statics, kStaticShared);
#endif
  free(block.statics);
  free(block.dynamic);
}

[[noreturn]] void deadlock() {
  unsigned shown = 0;
  for (const Block& block : machine.blocks) {
    for (const Thread& t : block.threads) {
      if (t.state == State::kDone || shown++ >= 8) continue;
      fprintf(stderr, "  block %u thread %u waits at %s, mask %08x\n", t.place.block.x, t.in_block,
              t.waits_at, t.mask);
    }
  }
  fail("deadlock: a barrier, a warp meeting or an mbarrier that not everybody comes to");
}

void run_cluster() {
  std::vector<Thread*> order;
  for (Block& block : machine.blocks) {
    for (Thread& t : block.threads) order.push_back(&t);
  }
  if (observer != nullptr) observer->cluster_begins();
  for (size_t ended = 0; ended < order.size();) {
    if (shuffle_order.seed != nullptr) {
      std::shuffle(order.begin(), order.end(), shuffle_order.random);
    }
    bool progress = false;
    for (Thread* t : order) {
      if (t->state != State::kReady) continue;
      resume(*t);
      progress = true;
      ended += t->state == State::kDone;
    }
    if (!progress && !land_one()) deadlock();
  }
  if (!machine.bulk.empty()) fail("a cluster ended before its bulk copies");
  if (observer != nullptr) observer->cluster_ends();
}

cudaError_t check_launch(const Shape& s, const void* kernel) {
  const unsigned threads = s.block.x * s.block.y * s.block.z;
  const bool valid = threads > 0 && threads <= 1024 && s.grid.x > 0 && s.grid.y > 0 &&
                     s.grid.z > 0 && s.grid.x <= 0x7fffffffu && s.grid.y <= 65535 &&
                     s.grid.z <= 65535;
  const bool clusters =
      s.cooperative || (s.cluster > 0 && s.cluster <= 8 && s.grid.x % s.cluster == 0 &&
                        (s.cluster == 1 || arch() >= 90));
  if (!valid || !clusters) return cudaErrorInvalidConfiguration;
  if (s.cooperative && s.cluster > static_cast<unsigned>(processors())) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  if (loaded_code() == 0) return cudaErrorNoKernelImageForDevice;
  if (s.shared > max_dynamic(kernel) || s.shared + static_of(kernel) > shared_limit()) {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

Shape shape_of(const cudaLaunchConfig_t& config) {
  Shape s = {config.grid, config.block, config.dynamicSmemBytes, 1, false};
  for (unsigned i = 0; i < config.numAttrs; i++) {
    const cudaLaunchAttribute& given = config.attrs[i];
    if (given.id == cudaLaunchAttributeClusterDimension) s.cluster = given.val.clusterDim.x;
    if (given.id == cudaLaunchAttributeCooperative) s.cooperative = given.val.cooperative != 0;
  }
  if (s.cooperative) s.cluster = s.grid.x * s.grid.y * s.grid.z;
  return s;
}

}  // namespace

void fail(const char* what) {
  fprintf(stderr, "cuda_host: %s", what);
  if (current != nullptr) {
    const Place& p = current->place;
    fprintf(stderr, " [block %u,%u,%u thread %u,%u,%u]", p.block.x, p.block.y, p.block.z,
            p.thread.x, p.thread.y, p.thread.z);
  }
  fprintf(stderr, " in %s\n", machine.kernel.c_str());
  abort();
}

void check_code(int arch) {
  if (machine.code < arch) fail("an instruction that the loaded code does not have");
}

cudaError_t resident(int* count, const void* kernel, size_t shared, unsigned cluster) {
  const std::lock_guard<std::mutex> lock(driver);
  const bool fits = shared <= max_dynamic(kernel);
  *count = fits ? processors() : 0;
  return fits || cluster == 1 ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* function, const char* kernel,
                const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(driver);
  const Shape shape = shape_of(config);
  const cudaError_t error = check_launch(shape, function);
  if (error != cudaSuccess) return last_error = error;
  machine.shape = shape;
  machine.kernel = kernel;
  machine.function = function;
  machine.code = loaded_code();
  log_launch();
  if (number_from("TOKFUSE_HOST_DRY", 0) != 0) return cudaSuccess;
  machine.launch++;
  machine.objects.clear();
  machine.static_bytes = machine.static_shared = 0;
  kernel_body = &body;
  if (shuffle_order.seed != nullptr) {
    shuffle_order.random.seed(static_cast<unsigned>(strtoul(shuffle_order.seed, nullptr, 10)));
  }
  const dim3 grid = shape.grid;
  const unsigned long blocks = static_cast<unsigned long>(grid.x) * grid.y * grid.z;
  for (unsigned long first = 0; first < blocks; first += shape.cluster) {
    machine.cluster = static_cast<unsigned>(first / shape.cluster);
    machine.blocks.resize(shape.cluster);
    for (unsigned rank = 0; rank < shape.cluster; rank++) {
      const unsigned long i = first + rank;
      make_block(machine.blocks[rank], rank,
                 {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)});
    }
    run_cluster();
    for (Block& block : machine.blocks) free_block(block);
  }
  return cudaSuccess;
}

const Place& here() { return current->place; }

int lane_here() { return static_cast<int>(current->lane); }

void* shared_object(const void* tag, size_t bytes, size_t alignment, const char* name) {
  const SharedObject* found = nullptr;
  for (const SharedObject& o : machine.objects) {
    if (o.tag == tag) found = &o;
  }
  if (found == nullptr) {
    const size_t step = alignment < kRedZone ? kRedZone : alignment;
    const size_t offset = (machine.static_bytes + kRedZone + step - 1) / step * step;
    if (offset + bytes + kRedZone > kStaticShared) fail("more than 48 KiB of static shared memory");
    machine.objects.push_back({tag, offset, bytes, name});
    machine.static_bytes = offset + bytes;
    machine.static_shared = (machine.static_shared + alignment - 1) / alignment * alignment + bytes;
    check_static_shared();
    found = &machine.objects.back();
  }
  unsigned char* at = current->block->statics + found->offset;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(at, bytes);
#endif
  return at;
}

void* dynamic_shared() { return current->block->dynamic; }

int block_meet(Vote vote, int predicate) {
  Block& block = *current->block;
  block.all &= predicate != 0;
  block.any |= predicate != 0;
  block.count += predicate != 0;
  current->state = State::kAtBlock;
  if (++block.waiting == block.alive) {
    release_block(block);
  } else {
    wait_as(State::kAtBlock, "__syncthreads");
  }
  switch (vote) {
    case Vote::kAnd:
      return block.last_all;
    case Vote::kOr:
      return block.last_any;
    case Vote::kCount:
      return block.last_count;
    case Vote::kNone:
      break;
  }
  return 0;
}

void warp_meet(unsigned mask) { meet_warp(mask, "__syncwarp", 0); }

uint64_t warp_read(unsigned mask, uint64_t value, int lane, const char* name) {
  meet_warp(mask, name, value);
  if (!(current->present >> lane & 1)) fail("a shuffle reads a lane that takes no part");
  return current->received[lane];
}

unsigned warp_ballot(unsigned mask, bool predicate) {
  meet_warp(mask, "__ballot_sync", predicate ? 1 : 0);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; lane++) {
    if (current->present >> lane & 1)
      ballot |= static_cast<unsigned>(current->received[lane]) << lane;
  }
  return ballot;
}

void fence() {
  if (observer != nullptr) observer->fence();
}

void atomic_access(void* at, size_t bytes) {
  if (observer != nullptr) observer->atomic(at, bytes, __builtin_return_address(0));
}

void check_aligned(const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail("a misaligned vector access");
}

// ---------------------------------------------------------------------------------------- cp.async

void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async copies 4, 8 or 16 bytes");
  check_aligned(to, bytes);
  check_aligned(from, bytes);
  current->copies.push_back({to, from, bytes, zeros});
}

void copy_async_commit() { current->groups.push_back(current->copies.size()); }

void copy_async_wait(size_t groups_left) {
  Thread& t = *current;
  if (t.groups.size() <= groups_left) return;
  const size_t done = t.groups[t.groups.size() - 1 - groups_left];
  for (size_t i = 0; i < done; i++) {
    const Copy& c = t.copies[i];
    memcpy(c.to, c.from, c.bytes - c.zeros);
    memset(static_cast<char*>(c.to) + c.bytes - c.zeros, 0, c.zeros);
    if (observer != nullptr) observer->copied(c);
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<int64_t>(done));
  t.groups.erase(t.groups.begin(), t.groups.end() - static_cast<int64_t>(groups_left));
  for (size_t& end : t.groups) end -= done;
}

// ------------------------------------------------------------------------- clusters and mbarriers

unsigned cluster_rank() { return current->block->rank; }

unsigned cluster_blocks() { return machine.shape.cluster; }

void cluster_meet() {
  size_t alive = 0;
  for (const Block& block : machine.blocks) alive += block.threads.size();
  if (++machine.cluster_waiting < alive) return wait_as(State::kAtCluster, "cluster_sync");
  machine.cluster_waiting = 0;
  std::vector<Thread*> met;
  for (Block& block : machine.blocks) {
    for (Thread& t : block.threads) {
      if (t.state != State::kAtCluster && &t != current) continue;
      t.state = State::kReady;
      met.push_back(&t);
    }
  }
  if (observer != nullptr) observer->met(met);
}

const void* cluster_address(const void* mine, unsigned rank) {
  if (rank >= machine.blocks.size()) fail("a rank beyond the cluster");
  const unsigned char* at = static_cast<const unsigned char*>(mine);
  const Block &from = *current->block, &to = machine.blocks[rank];
  if (to.alive == 0) fail("shared memory of a block that has ended");
  if (at >= from.statics && at < from.statics + kStaticShared) {
#if defined(__SANITIZE_ADDRESS__)
    // The owner may not have reached the declaration yet.
    for (const SharedObject& o : machine.objects) {
      ASAN_UNPOISON_MEMORY_REGION(to.statics + o.offset, o.bytes);
    }
#endif
    return to.statics + (at - from.statics);
  }
  if (at < from.dynamic || at >= from.dynamic + machine.shape.shared) {
    fail("no address of this block's shared memory");
  }
  return to.dynamic + (at - from.dynamic);
}

void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
  *barrier = {static_cast<int32_t>(arrivals), static_cast<int32_t>(arrivals), 0, 0};
  if (observer != nullptr) observer->arrived(barrier);
}

void mbarrier_expect(Mbarrier* barrier, unsigned bytes) {
  if (barrier->pending <= 0) fail("more arrivals at an mbarrier than its phase awaits");
  barrier->bytes += bytes;
  barrier->pending--;
  if (observer != nullptr) observer->arrived(barrier);
  advance(barrier);
}

void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  current->barrier = barrier;
  current->parity = parity;
  if (!phase_over(*current)) wait_as(State::kAtMbarrier, "mbarrier_wait");
  if (observer != nullptr) observer->waited(current, barrier);
}

void bulk_load(void* to, const void* from, unsigned bytes, Mbarrier* barrier) {
  check_bulk(to, from, bytes);
  BulkCopy bulk = {{to, from, bytes, 0}, barrier, 0};
  if (observer != nullptr) bulk.proxy = observer->bulk_started(bulk.copy);
  if (shuffle_order.seed != nullptr && shuffle_order.random() % 2 == 0) return land(bulk);
  machine.bulk.push_back(bulk);
}

}  // namespace host
}  // namespace tokfuse

// ----------------------------------------------------------------------------------- the runtime

using tokfuse::host::kGuard;
using tokfuse::host::observer;

cudaError_t cudaMalloc(void** at, size_t bytes) {
  // The checker needs guards around the memory. AddressSanitizer has guards of the heap.
  const size_t guard = observer != nullptr ? kGuard : 0;
  void* block = nullptr;
  if (posix_memalign(&block, 256, bytes + 2 * guard) != 0) return cudaErrorMemoryAllocation;
  memset(block, 0xff, bytes + 2 * guard);
  *at = static_cast<char*>(block) + guard;
  if (observer != nullptr) observer->allocated(*at, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* at) {
  if (observer != nullptr && at != nullptr) {
    observer->freed(at);
    at = static_cast<char*>(at) - kGuard;
  }
  free(at);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = tokfuse::host::last_error;
  tokfuse::host::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDevice(int* device) {
  const std::lock_guard<std::mutex> lock(tokfuse::host::driver);
  *device = tokfuse::host::device_number();
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == 0 || device >= 1000 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      // One, because each of them holds one block: `resident` returns the number of all blocks.
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(tokfuse::host::shared_limit());
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const std::lock_guard<std::mutex> lock(tokfuse::host::driver);
  const int code = tokfuse::host::loaded_code(), arch = tokfuse::host::arch();
  if (code == 0) return cudaErrorNoKernelImageForDevice;
  *attributes = {tokfuse::host::static_of(kernel), code, code / 10 == arch / 10 ? code : arch};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> lock(tokfuse::host::driver);
  const size_t bytes = static_cast<size_t>(value);
  if (value < 0 || bytes + tokfuse::host::static_of(kernel) > tokfuse::host::shared_limit()) {
    return cudaErrorInvalidValue;
  }
  auto& function = tokfuse::host::functions[{tokfuse::host::device_number(), kernel}];
  if (bytes < function.max_dynamic) {
    tokfuse::host::fail(
        "the shared memory of a kernel was lowered; a launch of another thread may need it");
  }
  function = {true, bytes};
  return cudaSuccess;
}
