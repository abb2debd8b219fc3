// Memory of large results, kept when its tensor is freed and handed out again.
//
// The first write to a fresh page costs more than the kernel that makes it: 100 MB of them take 20
// to 200 ms where the gradient of as many logits takes 8. torch's CPU allocator returns every large
// buffer to the system, so each step would pay this again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokfuse {

// Results from this size on are worth keeping; smaller ones malloc keeps by itself.
constexpr int64_t kKeptBytes = int64_t{1} << 20;

// `bytes` of memory, 64-byte aligned and not initialised. Throws std::bad_alloc.
void* take_buffer(size_t bytes);

// Returns what take_buffer gave; from any thread.
void return_buffer(void* data) noexcept;

// Gives all kept memory back to the system.
void release_buffers() noexcept;

// Bytes that are kept and not in use, and their limit: an eighth of the machine's memory, at most
// 2 GiB, or TOKFUSE_KEEP_MIB. The limit throws std::invalid_argument on a value of that variable
// which is no number.
size_t kept_bytes();
size_t kept_limit();

}  // namespace tokfuse
