// Declarations shared by machine.cpp and checker.cpp: the live threads and their events.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/device.cuh"

namespace tokfuse {
namespace host {

enum class State { kReady, kAtBlock, kAtWarp, kAtCluster, kAtMbarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

struct Block;

struct Thread {
  Place place;
  Block* block = nullptr;
  unsigned in_block = 0, in_cluster = 0, lane = 0;
  State state = State::kReady;
  const char* waits_at = "";
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  // state of a warp-level synchronisation
  unsigned mask = 0;
  const char* meeting = nullptr;
  uint64_t given = 0, received[32];
  unsigned present = 0;
  // state of a wait at an mbarrier
  Mbarrier* barrier = nullptr;
  unsigned parity = 0;
  // cp.async: copies without a wait so far, and the index at which each committed group ends
  std::vector<Copy> copies;
  std::vector<size_t> groups;
};

struct SharedObject {
  const void* tag;
  size_t offset, bytes;
  const char* name;
};

constexpr size_t kStaticShared = 48 * 1024;

struct Block {
  unsigned rank = 0;
  std::vector<Thread> threads;
  unsigned alive = 0, waiting = 0;
  int all = 1, any = 0, count = 0;                 // of the current vote
  int last_all = 1, last_any = 0, last_count = 0;  // of the last vote
  unsigned char* statics = nullptr;
  unsigned char* dynamic = nullptr;
};

struct BulkCopy {
  Copy copy;
  Mbarrier* barrier;
  unsigned proxy;  // the checker's number for the writer
};

struct Shape {
  dim3 grid, block;
  size_t shared;
  unsigned cluster;
  bool cooperative;  // all blocks are one cluster, of any size
};

// The clusters of one launch run in one Machine, one after the other.
struct Machine {
  Shape shape;
  std::string kernel;
  const void* function = nullptr;
  int code = 0;  // architecture of the loaded code
  uint64_t launch = 0;
  unsigned cluster = 0;  // index of the running cluster
  std::vector<Block> blocks;
  std::vector<SharedObject> objects;
  size_t static_bytes = 0;   // with red zones
  size_t static_shared = 0;  // without, as a compiler lays the objects out
  std::vector<BulkCopy> bulk;
  unsigned cluster_waiting = 0;
};

extern Machine machine;
// The running thread; null outside of kernels.
extern Thread* current;

// Receives every event that orders or accesses memory; null in a build without the checker.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void cluster_begins() = 0;
  virtual void cluster_ends() = 0;
  // These threads have synchronised: earlier accesses of each are visible to all.
  virtual void met(const std::vector<Thread*>& threads) = 0;
  virtual void arrived(const Mbarrier* barrier) = 0;
  virtual void waited(Thread* thread, const Mbarrier* barrier) = 0;
  // A bulk copy has started; returns its `proxy`.
  virtual unsigned bulk_started(const Copy& copy) = 0;
  virtual void bulk_landed(const BulkCopy& copy) = 0;
  virtual void copied(const Copy& copy) = 0;
  virtual void atomic(void* at, size_t bytes, const void* caller) = 0;
  virtual void fence() = 0;
  virtual void allocated(void* at, size_t bytes) = 0;
  virtual void freed(void* at) = 0;
};
extern Observer* observer;

// Stack size of a thread.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif

// Guard bytes on both sides of the memory that cudaMalloc returns.
constexpr size_t kGuard = 256;

}  // namespace host
}  // namespace tokfuse
