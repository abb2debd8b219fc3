// cudaStream_t and cudaError_t, of CUDA or of the execution on the CPU.
#pragma once

#if defined(TOKFUSE_CUDA_HOST)
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime_api.h>
#endif
