// The pretended device: the code that it loads, and the shared memory that a kernel may use. Part
// of machine.cpp.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

namespace tokfuse {
namespace host {
namespace {

std::mutex driver;  // guards everything below, and the machine: one launch runs at a time

unsigned long number_from(const char* variable, unsigned long otherwise) {
  const char* text = getenv(variable);
  return text == nullptr || *text == 0 ? otherwise : strtoul(text, nullptr, 10);
}

std::string text_from(const char* variable, const char* otherwise) {
  const char* text = getenv(variable);
  return text == nullptr ? otherwise : text;
}

int arch() { return static_cast<int>(number_from("TOKFUSE_HOST_ARCH", 90)); }

int processors() { return static_cast<int>(number_from("TOKFUSE_HOST_PROCESSORS", 2)); }

std::string built_code() { return text_from("TOKFUSE_HOST_CODE", "80,90,100,120"); }

// Number of the present device: another one for each description.
int device_number() {
  static std::vector<std::string> seen;
  const std::string device = std::to_string(arch()) + " " + built_code();
  auto at = std::find(seen.begin(), seen.end(), device);
  if (at == seen.end()) at = seen.insert(at, device);
  return at == seen.begin() ? 0 : 1000 + static_cast<int>(at - seen.begin());
}

// Static and dynamic shared memory of a block.
size_t shared_limit() {
  const int major = arch() / 10;
  if (major == 9 || major == 10) return 227 * 1024;
  return (arch() == 80 ? 163 : 99) * 1024;
}
constexpr size_t kWithoutAsking = 48 * 1024;

// Architecture of the code that the device loads, as it was compiled; 0 if there is none. Machine
// code of X.y runs on X.z with z >= y, that of an architecture with the suffix "a" only on X.y. The
// code for sm_80 is also built as PTX.
int loaded_code() {
  int best = 0;
  bool ptx = false;
  const std::string list = built_code() + ",";
  for (size_t from = 0, to; (to = list.find(',', from)) != std::string::npos; from = to + 1) {
    const std::string name = list.substr(from, to - from);
    const int code = atoi(name.c_str());
    const bool runs = name.back() == 'a' ? code == arch() : code <= arch();
    if (code / 10 == arch() / 10 && runs) best = std::max(best, code);
    ptx |= code == 80;
  }
  return best > 0 ? best : (ptx && arch() >= 80 ? 80 : 0);
}

struct Function {
  bool asked = false;
  size_t max_dynamic = 0;
};
std::map<std::pair<int, const void*>, Function> functions;
std::map<const void*, size_t> static_shared;  // of kernels that have run

size_t static_of(const void* kernel) {
  const auto found = static_shared.find(kernel);
  return found == static_shared.end() ? 0 : found->second;
}

// Largest dynamic shared memory with which a kernel may be launched.
size_t max_dynamic(const void* kernel) {
  const Function& f = functions[{device_number(), kernel}];
  if (f.asked) return f.max_dynamic;
  return kWithoutAsking - std::min(kWithoutAsking, static_of(kernel));
}

// Dynamic shared memory begins at a multiple of 1 KiB.
size_t round_static(size_t bytes, size_t dynamic) {
  return dynamic > 0 ? (bytes + 1023) / 1024 * 1024 : bytes;
}

// A kernel tells its static shared memory only by declaring it, so the first launch is checked
// while it runs.
void check_static_shared() {
  const size_t dynamic = machine.shape.shared;
  const size_t bytes = round_static(machine.static_shared, dynamic);
  size_t& known = static_shared[machine.function];
  known = std::max(known, bytes);
  if (bytes + dynamic > shared_limit()) fail("more shared memory than a block of the device has");
  if (dynamic > max_dynamic(machine.function)) {
    fail("more than 48 KiB of static and dynamic shared memory, without asking for it");
  }
}

// Appends a line to the file TOKFUSE_HOST_LOG: grid, block, cluster, dynamic shared memory, kernel.
void log_launch() {
  const std::string path = text_from("TOKFUSE_HOST_LOG", "");
  FILE* file = path.empty() ? nullptr : fopen(path.c_str(), "a");
  if (file == nullptr) return;
  const Shape& s = machine.shape;
  fprintf(file, "%u %u %u %zu %s\n", s.grid.x, s.block.x, s.cooperative ? 1 : s.cluster, s.shared,
          machine.kernel.c_str());
  fclose(file);
}

}  // namespace
}  // namespace host
}  // namespace tokfuse
