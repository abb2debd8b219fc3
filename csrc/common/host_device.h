// Declaration specifiers of a function that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define TOKFUSE_HD __host__ __device__ __forceinline__
#else
#define TOKFUSE_HD static inline
#endif
