// Checks kernels that machine.cpp runs for races, out-of-bounds accesses, coalescing and bank
// conflicts.
//
// Kernels are compiled with -fsanitize=thread but linked without its library. This file implements
// the calls that the compiler inserts at every load and store. A cell per byte stores the last
// writer and the readers since then. Vector clocks decide exactly whether an earlier access happens
// before a later one. Every thread has a clock. Barriers, __syncwarp, cluster synchronisation and
// mbarriers pass clocks on. Shuffles and votes do not order memory. A bulk copy is treated as a
// separate thread that starts with the clock of the thread that issued it. Between clusters only an
// atomic after a fence orders accesses.
//
// At the end it prints the problems, the bytes of device memory that each kernel reads and writes
// (in sectors of 32), and per source line the sectors per request of global accesses and the
// wavefronts of shared accesses. The exit status is 67 if there was a problem.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "traffic.h"

namespace tokfuse {
namespace host {
namespace {

constexpr uintptr_t kCell = 1;        // bytes; adjacent bytes have separate cells
constexpr int kProblems = 20;         // largest number of reported problems
constexpr size_t kManyReads = 16384;  // reads per cell before older ones are removed
constexpr int kExitStatus = 67;
constexpr unsigned kProxies = 64;  // bulk copies with separate clocks, per cluster

// Clocks of all threads of the cluster, followed by those of its bulk copies.
using Clock = std::vector<uint32_t>;
using Knowledge = std::shared_ptr<const Clock>;

struct Access {
  unsigned cluster = 0, thread = 0;
  uint32_t clock = 0;
  bool atomic = false;
  uintptr_t pc = 0;

  bool is_of(const Access& o) const { return cluster == o.cluster && thread == o.thread; }
};

struct Cell {
  uint64_t launch = 0;
  bool written = false;
  Access write;
  std::vector<Access> reads;  // since the write
};

struct Region {
  size_t bytes;
  std::vector<Cell> cells;
};

void join(Clock* into, const Clock& other) {
  for (size_t i = 0; i < into->size(); i++) (*into)[i] = std::max((*into)[i], other[i]);
}

class Checker : public Observer {
 public:
  Checker() { observer = this; }
  ~Checker() override { report(); }

  void cluster_begins() override {
    unsigned threads = 0;
    for (const Block& block : machine.blocks)
      threads += static_cast<unsigned>(block.threads.size());
    const auto nothing = std::make_shared<const Clock>(threads + kProxies, 0);
    threads_ = threads;
    knows_.assign(threads + kProxies, nothing);
    clock_.assign(threads + kProxies, 1);
    released_.clear();
    shared_.clear();
    next_proxy_ = 0;
    if (machine.cluster == 0) {
      fenced_.clear();
      published_.clear();
      acquired_.clear();
    }
  }

  void cluster_ends() override { traffic_.cluster_ends(machine.kernel); }

  void met(const std::vector<Thread*>& threads) override {
    auto all = std::make_shared<Clock>(threads_ + kProxies, 0);
    std::set<const Clock*> seen;
    for (const Thread* t : threads) {
      if (seen.insert(knows_[t->in_cluster].get()).second) {
        join(all.get(), *knows_[t->in_cluster]);
      }
    }
    for (const Thread* t : threads) {
      (*all)[t->in_cluster] = clock_[t->in_cluster];
    }
    for (const Thread* t : threads) {
      knows_[t->in_cluster] = all;
      clock_[t->in_cluster]++;
    }
  }

  void arrived(const Mbarrier* barrier) override { release(barrier, current->in_cluster); }

  void waited(Thread* thread, const Mbarrier* barrier) override {
    acquire(thread->in_cluster, released_[barrier]);
  }

  unsigned bulk_started(const Copy&) override {
    const unsigned proxy = threads_ + next_proxy_++ % kProxies;
    Clock known = *knows_[current->in_cluster];
    known[current->in_cluster] = clock_[current->in_cluster];
    join(&known, *knows_[proxy]);
    knows_[proxy] = std::make_shared<const Clock>(known);
    clock_[current->in_cluster]++;
    return proxy;
  }

  void bulk_landed(const BulkCopy& bulk) override {
    for (size_t i = 0; i < bulk.copy.bytes; i += 16) {
      const uintptr_t from = reinterpret_cast<uintptr_t>(bulk.copy.from) + i;
      const uintptr_t to = reinterpret_cast<uintptr_t>(bulk.copy.to) + i;
      moved(touch(from, 16, false, access_of(bulk.proxy, false, 0)), false, 16);
      moved(touch(to, 16, true, access_of(bulk.proxy, false, 0)), true, 16);
    }
    release(bulk.barrier, bulk.proxy);
  }

  void copied(const Copy& copy) override {
    const Access me = access_of(current->in_cluster, false, 0);
    const unsigned bytes = static_cast<unsigned>(copy.bytes);
    moved(touch(reinterpret_cast<uintptr_t>(copy.from), bytes, false, me), false, bytes);
    moved(touch(reinterpret_cast<uintptr_t>(copy.to), bytes, true, me), true, bytes);
  }

  void atomic(void* at, size_t bytes, const void* caller) override {
    if (current == nullptr) return;
    const Access me = access_of(current->in_cluster, true, reinterpret_cast<uintptr_t>(caller));
    touch(reinterpret_cast<uintptr_t>(at), static_cast<unsigned>(bytes), true, me);
    std::set<unsigned>& published = published_[at];
    std::set<unsigned>& acquired = acquired_[machine.cluster];
    acquired.insert(published.begin(), published.end());
    if (fenced_.count(machine.cluster) == 0) return;
    published.insert(machine.cluster);
    published.insert(acquired.begin(), acquired.end());
  }

  void fence() override { fenced_.insert(machine.cluster); }

  void allocated(void* at, size_t bytes) override {
    regions_[reinterpret_cast<uintptr_t>(at)] = {
        bytes, std::vector<Cell>((bytes + 2 * kGuard) / kCell + 1)};
  }

  void freed(void* at) override { regions_.erase(reinterpret_cast<uintptr_t>(at)); }

  // A load or store of a kernel.
  void access(uintptr_t at, unsigned bytes, bool write, uintptr_t pc) {
    if (current == nullptr || inside_) return;
    const uintptr_t stack = reinterpret_cast<uintptr_t>(current->stack);
    if (at >= stack && at < stack + kStack) return;
    inside_ = true;
    const Place place = touch(at, bytes, write, access_of(current->in_cluster, false, pc));
    if (place != Place::kElsewhere) {
      traffic_.access(place == Place::kShared, write, bytes, at, pc, current->in_cluster);
    }
    inside_ = false;
  }

 private:
  enum class Place { kElsewhere, kGlobal, kShared };

  Access access_of(unsigned thread, bool atomic, uintptr_t pc) const {
    return {machine.cluster, thread, clock_[thread], atomic, pc};
  }

  void release(const Mbarrier* barrier, unsigned thread) {
    Clock& known = released_[barrier];
    if (known.empty()) known.assign(threads_ + kProxies, 0);
    join(&known, *knows_[thread]);
    known[thread] = clock_[thread]++;
  }

  void acquire(unsigned thread, const Clock& known) {
    if (known.empty()) return;
    Clock joined = *knows_[thread];
    join(&joined, known);
    knows_[thread] = std::make_shared<const Clock>(joined);
  }

  bool over(const Access& before, const Access& now) {
    if (before.cluster != now.cluster) return acquired_[now.cluster].count(before.cluster) > 0;
    return before.thread == now.thread || before.clock <= (*knows_[now.thread])[before.thread];
  }

  // Checks and records one access. Returns the kind of its memory.
  Place touch(uintptr_t at, unsigned bytes, bool write, const Access& now) {
    Place place = Place::kElsewhere;
    if (Region* region = region_of(at)) {
      place = Place::kGlobal;
      const uintptr_t base = region_base_;
      if (at < base || at + bytes > base + region->bytes) outside(at, bytes, write, now, "device");
      for (uintptr_t cell = (at - base + kGuard) / kCell;
           cell <= (at + bytes - 1 - base + kGuard) / kCell && cell < region->cells.size();
           cell++) {
        check(&region->cells[cell], write, now, at, "device memory");
      }
    } else if (const Block* block = shared_of(at, bytes, write, now)) {
      // Accesses to another block's shared memory use the cluster's network and have no bank
      // conflicts.
      const bool mine = current != nullptr && block == current->block;
      place = mine ? Place::kShared : Place::kElsewhere;
      for (uintptr_t cell = at / kCell; cell <= (at + bytes - 1) / kCell; cell++) {
        check(&shared_[cell], write, now, at, "shared memory");
      }
    }
    return place;
  }

  Region* region_of(uintptr_t at) {
    auto next = regions_.upper_bound(at + kGuard);
    if (next == regions_.begin()) return nullptr;
    --next;
    region_base_ = next->first;
    return at < next->first + next->second.bytes + kGuard ? &next->second : nullptr;
  }

  const Block* shared_of(uintptr_t at, unsigned bytes, bool write, const Access& now) {
    for (const Block& block : machine.blocks) {
      const uintptr_t statics = reinterpret_cast<uintptr_t>(block.statics);
      const uintptr_t dynamic = reinterpret_cast<uintptr_t>(block.dynamic);
      if (at >= statics && at < statics + kStaticShared) {
        for (const SharedObject& o : machine.objects) {
          if (at >= statics + o.offset && at + bytes <= statics + o.offset + o.bytes) {
            return &block;
          }
        }
        outside(at, bytes, write, now, "static shared");
        return &block;
      }
      if (dynamic != 0 && at >= dynamic && at < dynamic + machine.shape.shared + kGuard) {
        if (at + bytes > dynamic + machine.shape.shared) {
          outside(at, bytes, write, now, "dynamic shared");
        }
        return &block;
      }
    }
    return nullptr;
  }

  void check(Cell* cell, bool write, const Access& now, uintptr_t at, const char* where) {
    if (cell->launch != machine.launch) {
      *cell = Cell();
      cell->launch = machine.launch;
    }
    if (cell->written && !(cell->write.atomic && now.atomic) && !over(cell->write, now)) {
      race(write ? "two writes" : "a read of a write", cell->write, now, at, where);
    }
    if (!write) {
      remember_read(&cell->reads, now);
      return;
    }
    for (const Access& read : cell->reads) {
      if (!over(read, now)) race("a write over a read", read, now, at, where);
    }
    cell->reads.clear();
    cell->write = now;
    cell->written = true;
  }

  // Only the last read of each thread matters. Removing older reads occasionally is faster than
  // searching for the thread's previous read every time.
  static void remember_read(std::vector<Access>* reads, const Access& now) {
    if (!reads->empty() && reads->back().is_of(now)) reads->pop_back();
    reads->push_back(now);
    if (reads->size() < kManyReads) return;
    std::set<std::pair<unsigned, unsigned>> seen;
    std::vector<Access> last;
    for (auto it = reads->rbegin(); it != reads->rend(); ++it) {
      if (seen.insert({it->cluster, it->thread}).second) last.push_back(*it);
    }
    *reads = last;
  }

  void race(const char* what, const Access& a, const Access& b, uintptr_t at, const char* where) {
    if (!reported_.insert({a.pc, b.pc}).second || problems_++ >= kProblems) return;
    fprintf(stderr, "cuda_host: race in %s at %#lx: %s that nothing orders\n", where,
            static_cast<unsigned long>(at), what);
    for (const Access* access : {&a, &b}) {
      const char* who = access->thread >= threads_ ? "bulk copy" : "thread";
      fprintf(stderr, "  cluster %u %s %u  %s\n", access->cluster, who, access->thread,
              line_of(access->pc).c_str());
    }
  }

  void outside(uintptr_t at, unsigned bytes, bool write, const Access& now, const char* where) {
    if (!reported_.insert({now.pc, 1}).second || problems_++ >= kProblems) return;
    fprintf(stderr, "cuda_host: out of bounds: %u bytes %s outside of a %s array at %#lx\n", bytes,
            write ? "written" : "read", where, static_cast<unsigned long>(at));
    fprintf(stderr, "  cluster %u thread %u  %s\n", now.cluster, now.thread,
            line_of(now.pc).c_str());
  }

  std::string line_of(uintptr_t pc) {
    if (pc == 0) return "an asynchronous copy";
    Dl_info info;
    const uintptr_t base = dladdr(reinterpret_cast<void*>(pc), &info) != 0
                               ? reinterpret_cast<uintptr_t>(info.dli_fbase)
                               : 0;
    char command[256], line[512];
    snprintf(command, sizeof(command), "addr2line -Cipe /proc/%d/exe %#lx 2>/dev/null",
             static_cast<int>(getpid()), static_cast<unsigned long>(pc - 1 - base));
    std::string found;
    if (FILE* pipe = popen(command, "r")) {
      // The innermost inlined position outside of these two headers.
      while (fgets(line, sizeof(line), pipe) != nullptr) {
        const bool ours =
            strstr(line, "device_host.h") == nullptr && strstr(line, "cuda_host.h") == nullptr;
        if (found.empty() && ours) found = place_in(line);
      }
      pclose(pipe);
    }
    return found;
  }

  // Returns "file.cuh:12" from a line of addr2line.
  static std::string place_in(const std::string& line) {
    const size_t end = line.find_first_of(" \n", line.rfind('/'));
    const size_t begin = line.rfind('/', end);
    return line.substr(begin == std::string::npos ? 0 : begin + 1, end - begin - 1);
  }

  void moved(Place place, bool write, uint64_t bytes) {
    if (place == Place::kGlobal) traffic_.moved(machine.kernel, write, bytes);
  }

  void report() {
    inside_ = true;
    fprintf(stderr, "cuda_host: %d problems\n", problems_);
    traffic_.report([this](uintptr_t pc) { return line_of(pc); });
    if (problems_ > 0) _exit(kExitStatus);
  }

  unsigned threads_ = 0, next_proxy_ = 0;
  std::vector<Knowledge> knows_;
  std::vector<uint32_t> clock_;
  std::unordered_map<const Mbarrier*, Clock> released_;
  std::map<uintptr_t, Region> regions_;
  uintptr_t region_base_ = 0;
  std::unordered_map<uintptr_t, Cell> shared_;
  std::set<unsigned> fenced_;
  std::map<void*, std::set<unsigned>> published_;
  std::map<unsigned, std::set<unsigned>> acquired_;
  Traffic traffic_;
  std::set<std::pair<uintptr_t, uintptr_t>> reported_;
  int problems_ = 0;
  bool inside_ = false;
};

Checker checker;

}  // namespace
}  // namespace host
}  // namespace tokfuse

// ---------------------------------------------------------------- functions the compiler calls

using tokfuse::host::checker;

#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define ACCESS(name, bytes, write) \
  void name(void* at) { checker.access(reinterpret_cast<uintptr_t>(at), bytes, write, CALLER); }
#define ACCESSES(bytes)                              \
  ACCESS(__tsan_read##bytes, bytes, false)           \
  ACCESS(__tsan_write##bytes, bytes, true)           \
  ACCESS(__tsan_unaligned_read##bytes, bytes, false) \
  ACCESS(__tsan_unaligned_write##bytes, bytes, true)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

// The guard of a static variable of a function.
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

void __tsan_read_range(void* at, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) {
    checker.access(reinterpret_cast<uintptr_t>(at) + i,
                   static_cast<unsigned>(bytes - i < 4 ? bytes - i : 4), false, CALLER);
  }
}

void __tsan_write_range(void* at, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) {
    checker.access(reinterpret_cast<uintptr_t>(at) + i,
                   static_cast<unsigned>(bytes - i < 4 ? bytes - i : 4), true, CALLER);
  }
}
}
