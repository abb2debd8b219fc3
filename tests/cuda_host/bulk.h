// Bulk copies that have started but not completed, and the phases of the mbarriers that count them.
// Part of machine.cpp.
#pragma once

#include <cstring>

#include "fibers.h"
#include "machine.h"

namespace tokfuse {
namespace host {
namespace {

bool phase_over(const Thread& t) { return (t.barrier->phase & 1) != t.parity; }

// Ends the phase if no arrival and no byte is pending.
void advance(Mbarrier* barrier) {
  if (barrier->pending > 0 || barrier->bytes != 0) return;
  barrier->phase++;
  barrier->pending = barrier->arrivals;
  for (Block& block : machine.blocks) {
    for (Thread& t : block.threads) {
      if (t.state == State::kAtMbarrier && t.barrier == barrier && phase_over(t)) {
        t.state = State::kReady;
      }
    }
  }
}

void land(const BulkCopy& bulk) {
  memcpy(bulk.copy.to, bulk.copy.from, bulk.copy.bytes);
  if (observer != nullptr) observer->bulk_landed(bulk);
  bulk.barrier->bytes -= static_cast<int64_t>(bulk.copy.bytes);
  advance(bulk.barrier);
}

bool land_one() {
  if (machine.bulk.empty()) return false;
  const size_t which =
      shuffle_order.seed == nullptr ? 0 : shuffle_order.random() % machine.bulk.size();
  const BulkCopy bulk = machine.bulk[which];
  machine.bulk.erase(machine.bulk.begin() + static_cast<int64_t>(which));
  land(bulk);
  return true;
}

void check_bulk(const void* to, const void* from, unsigned bytes) {
  const uintptr_t any = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
  if (any % 16 != 0) fail("a bulk copy must have addresses and bytes that are multiples of 16");
  if (bytes == 0) fail("a bulk copy of nothing");
}

}  // namespace
}  // namespace host
}  // namespace tokfuse
