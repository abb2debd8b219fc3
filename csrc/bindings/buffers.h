// Memory of large results. It is kept when its tensor is freed, and used for a later result.
//
// The first write to a fresh page takes longer than the kernel that writes it: 20 to 200 ms for 100
// MB of fresh pages, against 8 ms for the gradient of as many logits. torch's CPU allocator returns
// every large buffer to the system, so every step would pay for fresh pages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokfuse {

// Results of this size and more are kept. malloc itself keeps the memory of smaller ones.
constexpr int64_t kKeptBytes = int64_t{1} << 20;

// `bytes` of memory, 64-byte aligned and not initialised. Throws std::bad_alloc.
void* take_buffer(size_t bytes);

// Takes back memory that take_buffer returned. Any thread may call it.
void return_buffer(void* data) noexcept;

// Returns all kept memory to the system.
void release_buffers() noexcept;

// Bytes that are kept and not in use, and their limit: an eighth of the machine's memory and at
// most 4 GiB, or TOKFUSE_KEEP_MIB. A float32 dW of 256,000 x 2304 takes 2.2 GiB. kept_limit throws
// std::invalid_argument if that variable is not a number.
size_t kept_bytes();
size_t kept_limit();

}  // namespace tokfuse
