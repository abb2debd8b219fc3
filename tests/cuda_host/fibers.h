// Fibers of one OS thread: a context switch of a dozen instructions, and stacks with a guard page.
// Part of machine.cpp.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <random>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace tokfuse {
namespace host {
namespace {

constexpr size_t kPage = 4096;

struct Scheduler {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};
Scheduler scheduler;

extern "C" void tokfuse_host_switch(void** save, void* to);  // x86-64, System V
__asm__(R"(
.text
.type tokfuse_host_switch, @function
tokfuse_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void to_scheduler() {
  Thread& t = *current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(t.state == State::kDone ? nullptr : &t.fake_stack,
                                 scheduler.bottom, scheduler.size);
#endif
  tokfuse_host_switch(&t.stack_pointer, scheduler.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t.fake_stack, &scheduler.bottom, &scheduler.size);
#endif
}

void resume(Thread& t) {
  current = &t;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, t.stack, kStack);
#endif
  tokfuse_host_switch(&scheduler.stack_pointer, t.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

// Empty without TOKFUSE_HOST_SEED. Every launch resets the seed, so that each one is reproducible.
struct Shuffle {
  const char* seed = getenv("TOKFUSE_HOST_SEED");
  std::mt19937 random;
};
Shuffle shuffle_order;

// The first function that a fiber runs.
void fiber_begins() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
}

// Stacks exist until the process ends. The page below each stack is a guard page.
unsigned char* stack_of(size_t index) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= index) {
    void* at = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) fail("no memory for the stack of a thread");
    mprotect(at, kPage, PROT_NONE);
    stacks.push_back(static_cast<unsigned char*>(at) + kPage);
  }
  return stacks[index];
}

// Returns the stack pointer of a new fiber that starts in `main`.
void* fiber_of(unsigned char* stack, void (*main)()) {
  void** top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr;  // return address of main, which does not return
  *--top = reinterpret_cast<void*>(main);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  return top;
}

}  // namespace
}  // namespace host
}  // namespace tokfuse
