// Cost of the memory accesses of kernels: bytes of device memory per kernel, and per source line
// the sectors per request of global accesses and the wavefronts of shared accesses.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <unordered_map>

namespace tokfuse {
namespace host {

class Traffic {
 public:
  // Records one lane's part of a load or store. The lanes of a warp that execute the same
  // instruction for the same number of times form one request.
  void access(bool shared, bool write, unsigned bytes, uintptr_t at, uintptr_t pc,
              unsigned thread) {
    const unsigned lane = thread % 32;
    const unsigned time = times_[{pc, thread, 0}]++;
    Request& request = requests_[{pc, thread / 32, time}];
    request.shared = shared;
    request.write = write;
    request.bytes = bytes;
    request.lanes |= 1u << lane;
    request.at[lane] = at;
  }

  // Bytes that go over the bus of device memory if there are no caches.
  void moved(const std::string& kernel, bool write, uint64_t bytes) {
    moved_[kernel][write ? 1 : 0] += bytes;
  }

  void cluster_ends(const std::string& kernel) {
    for (auto& [key, request] : requests_) {
      Line& line = lines_[key.pc];
      line.shared = request.shared;
      line.write = request.write;
      line.bytes = request.bytes;
      line.requests++;
      if (request.shared) {
        count_wavefronts(&line, request);
      } else {
        moved(kernel, request.write, 32 * count_sectors(&line, request));
      }
    }
    requests_.clear();
    times_.clear();
  }

  // `line_of(pc)`: "file.cuh:12".
  template <typename LineOf>
  void report(LineOf line_of) const {
    for (const auto& [kernel, bytes] : moved_) {
      fprintf(stderr, "cuda_host: %s: %lu bytes read, %lu bytes written\n", kernel.c_str(),
              static_cast<unsigned long>(bytes[0]), static_cast<unsigned long>(bytes[1]));
    }
    std::map<std::string, Line> named;
    for (const auto& [pc, line] : lines_) {
      char key[64];
      snprintf(key, sizeof(key), "%s %s %2u bytes ", line.shared ? "shared" : "device",
               line.write ? "store" : "load", line.bytes);
      Line& sum = named[key + line_of(pc)];
      sum.shared = line.shared;
      sum.requests += line.requests;
      sum.units += line.units;
      sum.fewest += line.fewest;
    }
    for (const auto& [name, line] : named) {
      fprintf(stderr, "  %-52s %8lu requests, %.2f of the fewest %s\n", name.c_str(),
              static_cast<unsigned long>(line.requests),
              static_cast<double>(line.units) / static_cast<double>(line.fewest),
              line.shared ? "wavefronts" : "sectors");
    }
  }

 private:
  struct Request {
    bool shared, write;
    unsigned bytes;
    uint32_t lanes;
    uintptr_t at[32];

    bool has(unsigned lane) const { return (lanes >> lane & 1) != 0; }
  };

  struct Line {
    bool shared = false, write = false;
    unsigned bytes = 0;
    uint64_t requests = 0, units = 0, fewest = 0;  // units: sectors, or wavefronts
  };

  struct Key {
    uintptr_t pc;
    unsigned unit, time;  // index of a warp, or of a thread
    bool operator==(const Key& o) const { return pc == o.pc && unit == o.unit && time == o.time; }
  };
  struct HashKey {
    size_t operator()(const Key& k) const {
      return (k.pc * 0x9e3779b97f4a7c15ull) ^ (static_cast<size_t>(k.unit) << 32 | k.time) * 31;
    }
  };

  // Counts sectors of 32 bytes.
  static uint64_t count_sectors(Line* line, const Request& r) {
    std::set<uintptr_t> sectors, places;
    for (unsigned lane = 0; lane < 32; lane++) {
      if (!r.has(lane)) continue;
      for (uintptr_t b = r.at[lane] / 32; b <= (r.at[lane] + r.bytes - 1) / 32; b++) {
        sectors.insert(b);
      }
      places.insert(r.at[lane]);
    }
    line->units += sectors.size();
    line->fewest += (places.size() * r.bytes + 31) / 32;
    return sectors.size();
  }

  // Counts wavefronts of 32 banks. Lanes are served in groups whose words fill all banks once.
  static void count_wavefronts(Line* line, const Request& r) {
    const unsigned words = std::max(1u, r.bytes / 4), group = 32 / words;
    for (unsigned first = 0; first < 32; first += group) {
      std::map<uintptr_t, std::set<uintptr_t>> banks;
      for (unsigned lane = first; lane < first + group; lane++) {
        if (!r.has(lane)) continue;
        for (unsigned w = 0; w < words; w++) {
          const uintptr_t word = r.at[lane] / 4 + w;
          banks[word % 32].insert(word);
        }
      }
      size_t most = 0;
      for (const auto& [bank, distinct] : banks) most = std::max(most, distinct.size());
      line->units += most;
      line->fewest += most > 0;
    }
  }

  std::unordered_map<Key, Request, HashKey> requests_;
  std::unordered_map<Key, unsigned, HashKey> times_;
  std::map<uintptr_t, Line> lines_;
  std::map<std::string, std::array<uint64_t, 2>> moved_;  // kernel -> bytes read, written
};

}  // namespace host
}  // namespace tokfuse
