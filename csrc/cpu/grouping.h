// Groups rows by id in O(rows) with a hash table. The ids may be any integers, unsorted and with
// gaps.
#pragma once

#include <cstdint>

#include "cpu/packed_kernels.h"

namespace tokfuse {
namespace TOKFUSE_ISA {

// Groups are numbered by first appearance. Rows keep their order inside a group.
struct Grouping {
  int64_t groups;
  int64_t* group;  // (rows) group of each row
  int64_t* row;    // (rows) row numbers, group by group
  int64_t* start;  // (groups + 1) borders of the groups in `row`
};

static inline uint64_t mix(uint64_t x) {  // finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// `scratch` holds grouping_scratch(rows) elements.
static inline Grouping group_rows(const int64_t* ids, int64_t rows, int64_t* scratch) {
  int64_t slots = 16;
  while (slots < 2 * rows) slots *= 2;
  Grouping g = {0, scratch, scratch + rows, scratch + 2 * rows};
  int64_t* key = scratch + 3 * rows + 1;  // (slots) id
  int64_t* number = key + slots;          // (slots) group, or -1
  for (int64_t i = 0; i < slots; i++) number[i] = -1;
  for (int64_t i = 0; i < rows; i++) {
    if (i > 0 && ids[i] == ids[i - 1]) {
      g.group[i] = g.group[i - 1];
    } else {
      uint64_t slot = mix(static_cast<uint64_t>(ids[i])) & (slots - 1);
      while (number[slot] >= 0 && key[slot] != ids[i]) slot = (slot + 1) & (slots - 1);
      if (number[slot] < 0) {
        key[slot] = ids[i];
        g.start[g.groups] = 0;
        number[slot] = g.groups++;
      }
      g.group[i] = number[slot];
    }
    g.start[g.group[i]]++;
  }
  int64_t total = 0;
  for (int64_t k = 0; k < g.groups; k++) {
    const int64_t size = g.start[k];
    g.start[k] = total;
    total += size;
  }
  // Placing the rows of a group moves its `start` to its end. Afterwards the entries are shifted
  // back by one group.
  for (int64_t i = 0; i < rows; i++) g.row[g.start[g.group[i]]++] = i;
  for (int64_t k = g.groups; k > 0; k--) g.start[k] = g.start[k - 1];
  g.start[0] = 0;
  return g;
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
