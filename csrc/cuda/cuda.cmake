# Builds the CUDA kernels of _native if nvcc is found. No GPU is needed. Sets TOKFUSE_CUDA_OBJECTS,
# TOKFUSE_CUDA_VERSION and TOKFUSE_CUDA_ARCHS; they are empty without nvcc.
set(TOKFUSE_CUDA "AUTO" CACHE STRING "CUDA kernels: AUTO (if nvcc is found), ON or OFF")
set(TOKFUSE_CUDA_ARCHITECTURES "80;90a;100a" CACHE STRING "Architectures that kernels are compiled for")
set(TOKFUSE_CUDA_OBJECTS "")
set(TOKFUSE_CUDA_VERSION "")
set(TOKFUSE_CUDA_ARCHS "")

if(NOT TOKFUSE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TOKFUSE_CUDA must be AUTO, ON or OFF; got ${TOKFUSE_CUDA}")
endif()
if(TOKFUSE_CUDA STREQUAL "OFF")
  message(STATUS "tokfuse: no CUDA kernels (TOKFUSE_CUDA=OFF)")
  return()
endif()

if(NOT DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
  find_program(TOKFUSE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
  if(TOKFUSE_NVCC)
    set(ENV{CUDACXX} ${TOKFUSE_NVCC})
  endif()
endif()
# Keeps CMake from adding a default architecture. The architectures are set below.
set(CMAKE_CUDA_ARCHITECTURES OFF)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(TOKFUSE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TOKFUSE_CUDA=ON needs a working nvcc; none was found. Set CUDACXX or "
                        "CUDA_HOME, or build with TOKFUSE_CUDA=AUTO.")
  endif()
  message(STATUS "tokfuse: no CUDA kernels (no working nvcc was found; TOKFUSE_CUDA=AUTO)")
  return()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)

# sm_80 is also stored as PTX, which newer GPUs compile when they load it. The code for sm_90a and
# sm_100a uses bulk copies and clusters, that for sm_100a also packed float32; it runs on those GPUs
# only. An architecture that nvcc is too old for is left out.
set(since_90a 12.0)
set(since_100a 12.8)
set(gencode "")
foreach(arch ${TOKFUSE_CUDA_ARCHITECTURES})
  if(DEFINED since_${arch} AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS "${since_${arch}}")
    message(STATUS "tokfuse: nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not support sm_${arch}")
    continue()
  endif()
  list(APPEND TOKFUSE_CUDA_ARCHS ${arch})
  set(code sm_${arch})
  if(arch STREQUAL "80")
    set(code [sm_80,compute_80])
  endif()
  list(APPEND gencode -gencode=arch=compute_${arch},code=${code})
endforeach()
set(TOKFUSE_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
list(JOIN TOKFUSE_CUDA_ARCHS "," TOKFUSE_CUDA_ARCHS)
message(STATUS "tokfuse: CUDA kernels for ${TOKFUSE_CUDA_ARCHS} (nvcc ${TOKFUSE_CUDA_VERSION})")

file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu)
add_library(tokfuse_cuda OBJECT ${sources})
target_include_directories(tokfuse_cuda PRIVATE csrc)
# -lineinfo lets profilers and compute-sanitizer report source lines. It does not change the code.
target_compile_options(tokfuse_cuda PRIVATE ${gencode} -lineinfo -Xfatbin=-compress-all
                                            -Xcompiler=-Wall,-Wextra)
set(TOKFUSE_CUDA_OBJECTS $<TARGET_OBJECTS:tokfuse_cuda>)
