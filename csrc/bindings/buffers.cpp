#include "bindings/buffers.h"

#include <cstdlib>
#include <iterator>
#include <list>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace tokfuse {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Buffer {
  void* data;
  size_t bytes;
};

// Rounds up to 2 MiB, and above 8 MiB by less than a quarter, so that batches of nearly the same
// size can use the same buffer. Pages that are never written take no memory.
size_t rounded(size_t bytes) {
  size_t step = kHugePage;
  while (step * 8 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* allocate(size_t bytes) {
  void* data = std::aligned_alloc(kHugePage, bytes);
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // A page fault then maps 2 MiB instead of 4 KiB.
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

size_t limit_of_environment() {
  const char* text = std::getenv("TOKFUSE_KEEP_MIB");
  if (text != nullptr && *text != '\0') {
    const std::string digits = text;
    if (digits.size() > 9 || digits.find_first_not_of("0123456789") != std::string::npos) {
      throw std::invalid_argument("TOKFUSE_KEEP_MIB must be a number of MiB; got \"" + digits +
                                  "\". Unset it for the default, or set 0 to keep nothing.");
    }
    return static_cast<size_t>(std::stoul(digits)) << 20;
  }
  size_t limit = size_t{4} << 30;
#if defined(__linux__)
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  if (pages > 0 && page > 0) {
    const size_t eighth = static_cast<size_t>(pages) / 8 * static_cast<size_t>(page);
    if (eighth < limit) limit = eighth;
  }
#endif
  return limit;
}

class Pool {
 public:
  void* take(size_t bytes) {
    const size_t wanted = rounded(bytes);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = kept_.end();
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        const bool fits = it->bytes >= wanted && it->bytes <= 2 * wanted;
        if (fits && (best == kept_.end() || it->bytes < best->bytes)) best = it;
      }
      if (best != kept_.end()) {
        const Buffer found = *best;
        kept_.erase(best);
        kept_bytes_ -= found.bytes;
        used_.emplace(found.data, found.bytes);
        return found.data;
      }
    }
    void* data = allocate(wanted);
    const std::lock_guard<std::mutex> lock(mutex_);
    used_.emplace(data, wanted);
    return data;
  }

  void put_back(void* data) noexcept {
    std::list<Buffer> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = used_.find(data);
      const Buffer returned = {data, found->second};
      used_.erase(found);
      // One that can never be kept must not push out those that are.
      (returned.bytes > limit_ ? dropped : kept_).push_front(returned);
      if (dropped.empty()) kept_bytes_ += returned.bytes;
      while (kept_bytes_ > limit_) {  // frees the least recently used first
        kept_bytes_ -= kept_.back().bytes;
        dropped.splice(dropped.end(), kept_, std::prev(kept_.end()));
      }
    }
    for (const Buffer& b : dropped) std::free(b.data);
  }

  void release() noexcept {
    std::list<Buffer> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      dropped.swap(kept_);
      kept_bytes_ = 0;
    }
    for (const Buffer& b : dropped) std::free(b.data);
  }

  size_t kept() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_bytes_;
  }

  size_t limit() const noexcept { return limit_; }

 private:
  std::mutex mutex_;
  std::list<Buffer> kept_;  // a few, most recently used first
  std::unordered_map<void*, size_t> used_;
  size_t kept_bytes_ = 0;
  const size_t limit_ = limit_of_environment();
};

// Never destroyed, because tensors may be freed after static objects.
Pool& pool() {
  static Pool* const one = new Pool();
  return *one;
}

}  // namespace

void* take_buffer(size_t bytes) { return pool().take(bytes); }
void return_buffer(void* data) noexcept { pool().put_back(data); }
void release_buffers() noexcept { pool().release(); }
size_t kept_bytes() { return pool().kept(); }
size_t kept_limit() { return pool().limit(); }

}  // namespace tokfuse
