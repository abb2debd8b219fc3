// Launcher of policy_step.cuh. It chooses the kernel and the layout of rows in shared memory.
#include "cuda/launch.h"
#include "cuda/policy_step.cuh"

namespace tokfuse {
namespace cuda {
namespace {

// Largest dynamic shared memory of a block. With 3 KiB of static shared memory, which end at a
// multiple of 1 KiB, this is all that sm_90 and sm_100 have: 227 KiB.
constexpr size_t kSharedBytes = 224 * 1024;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The smallest cluster whose blocks can hold two rows, or one row if two do not fit; with
// `tangents` bytes per vector, one row and its tangents. It depends only on the bytes of a row,
// because the order of the sums depends on it. cluster = 0: a row does not fit.
struct ClusterChoice {
  unsigned cluster;
  ClusterLayout layout;
  int tangents;

  size_t shared() const {
    return static_cast<size_t>(layout.slice) * (16 * layout.stages + tangents);
  }
};

ClusterChoice choose_cluster(int64_t vectors, int tangents) {
  for (int stages = tangents > 0 ? 1 : kMaxStages; stages > 0; stages--) {
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      // Slices begin at multiples of 128 bytes.
      const int64_t slice = round_up((vectors + cluster - 1) / cluster, 8);
      const int64_t tiles =
          (slice + kTileOf<false> * kPolicyThreads - 1) / (kTileOf<false> * kPolicyThreads);
      if (static_cast<size_t>(slice * (16 * stages + tangents)) <= kSharedBytes &&
          tiles <= kMaxTiles) {
        return {static_cast<unsigned>(cluster), {static_cast<int>(slice), stages}, tangents};
      }
    }
  }
  return {0, {0, 0}, 0};
}

// Launches the portable kernel on a grid of at most as many rows as fit three quarters of L2.
template <class T, class G, bool kTransform>
cudaError_t launch_portable(const LogitsArgs& a, const TokenStatsOut& out,
                            const TokenObjectiveArgs& o, const GradRows& grads, bool aligned,
                            bool together, cudaStream_t stream) {
  int64_t cache = 0;
  const cudaError_t error = l2_bytes(&cache);
  if (error != cudaSuccess) return error;
  const int64_t row_bytes = a.vocab * static_cast<int64_t>(sizeof(T));
  const int64_t fit = cache / 4 * 3 / (row_bytes > 0 ? row_bytes : 1);
  const int64_t rows = a.rows < fit || fit < 1 ? a.rows : fit;
  return launch_resident(policy_step_kernel<T, G, kTransform>, rows, kPolicyThreads, stream, a, out,
                         o, grads, aligned, together);
}

// Sets `launched` to false if the device cannot run the kernel: the driver loaded code for an older
// architecture, a block has less shared memory (sm_120), or no cluster of this size fits (a MIG
// instance).
template <class T, class G, bool kTransform>
cudaError_t launch_cluster(const ClusterChoice& choice, const LogitsArgs& a,
                           const TokenStatsOut& out, const TokenObjectiveArgs& o,
                           const GradRows& grads, cudaStream_t stream, bool* launched) {
  const auto kernel = policy_step_cluster_kernel<T, G, kTransform>;
  LaunchShape shape = {1, kPolicyThreads, choice.shared(), choice.cluster};
  KernelCode code;
  cudaError_t error = kernel_code(kernel, &code);
  *launched = code.arch >= 90 && code.max_dynamic >= kSharedBytes;
  if (error != cudaSuccess || !*launched) return error;
  error = resident_blocks(kernel, shape, &shape.blocks);
  *launched = error == cudaSuccess && shape.blocks > 0;
  if (!*launched) return error;
  const int64_t wanted = a.rows * choice.cluster;
  if (wanted < shape.blocks) shape.blocks = wanted;
  return launch(kernel, shape, stream, a, out, o, grads, choice.layout);
}

}  // namespace

cudaError_t policy_step(const LogitsArgs& a, const TokenStatsOut& out, const TokenObjectiveArgs& o,
                        const GradRows& grads, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  return by_dtypes(a.dtype, grads.grad_dtype, [&](auto* type, auto* grad_type) {
    using T = Pointee<decltype(type)>;
    using G = Pointee<decltype(grad_type)>;
    const bool aligned = rows_aligned<T>(a.logits, a.stride);
    const bool together =
        rows_together<T, G>(a.logits, a.stride, grads.grad_logits, grads.grad_stride);
    return by_flag(a.softcap != 0.0f, [&](auto transformed) {
      constexpr bool kTransform = decltype(transformed)::value;
      const ClusterChoice choice =
          choose_cluster(a.vocab / kItems<T>, kTransform ? 4 * kItems<T> : 0);
      if (aligned && together && choice.cluster > 0) {
        bool launched = false;
        const cudaError_t result =
            launch_cluster<T, G, kTransform>(choice, a, out, o, grads, stream, &launched);
        if (launched || result != cudaSuccess) return result;
      }
      return launch_portable<T, G, kTransform>(a, out, o, grads, aligned, together, stream);
    });
  });
}

}  // namespace cuda
}  // namespace tokfuse
