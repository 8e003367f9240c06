// The part of CUDA's language and runtime that the sources use, on the CPU; see cuda_emulation.h.
#pragma once

#include <math.h>
#include <cmath>
#include <tuple>

#include "cuda_emulation.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define CUDA_EMULATION_ARCH 900

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

// Threads ----------------------------------------------------------------------------------------------------------------

inline void __syncthreads(cuda_emulation::Where where = cuda_emulation::Where::current()) {
  cuda_emulation::barrier(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_emulation::Where where = cuda_emulation::Where::current()) {
  cuda_emulation::meet(mask, nullptr, 0, "__syncwarp", where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, cuda_emulation::Where where = cuda_emulation::Where::current()) {
  const unsigned lane = cuda_emulation::number() % 32;
  return cuda_emulation::from_lane(mask, value, lane ^ static_cast<unsigned>(by), "__shfl_xor_sync", where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, cuda_emulation::Where where = cuda_emulation::Where::current()) {
  return cuda_emulation::from_lane(mask, value, static_cast<unsigned>(source) % 32, "__shfl_sync", where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, cuda_emulation::Where where = cuda_emulation::Where::current()) {
  const unsigned lane = cuda_emulation::number() % 32;
  return cuda_emulation::from_lane(mask, value, lane < by ? lane : lane - by, "__shfl_up_sync", where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, cuda_emulation::Where where = cuda_emulation::Where::current()) {
  const unsigned lane = cuda_emulation::number() % 32;
  return cuda_emulation::from_lane(mask, value, lane + by > 31 ? lane : lane + by, "__shfl_down_sync", where);
}
inline unsigned __ballot_sync(unsigned mask, int set, cuda_emulation::Where where = cuda_emulation::Where::current()) {
  const std::byte* values = cuda_emulation::meet(mask, &set, sizeof set, "__ballot_sync", where);
  unsigned found = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    int other = 0;
    if (mask >> lane & 1u) std::memcpy(&other, values + cuda_emulation::kBrought * lane, sizeof other);
    found |= static_cast<unsigned>(other != 0) << lane;
  }
  return found;
}
inline void __nanosleep(unsigned, cuda_emulation::Where where = cuda_emulation::Where::current()) {
  cuda_emulation::sleep(where);
}
inline void __threadfence() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() {}

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicExch(T* at, T value) {
  return std::exchange(*at, value);
}

// Arithmetic; compiled without contraction, so that each is rounded by itself. ---------------------------------------------

template <class A, class B>
constexpr auto min(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return static_cast<Common>(b) < static_cast<Common>(a) ? static_cast<Common>(b) : static_cast<Common>(a);
}
template <class A, class B>
constexpr auto max(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return static_cast<Common>(a) < static_cast<Common>(b) ? static_cast<Common>(b) : static_cast<Common>(a);
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
using std::isnan;
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int8_t>(static_cast<unsigned>(a) >> (8 * i)) * static_cast<int8_t>(static_cast<unsigned>(b) >> (8 * i));
  }
  return sum;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *static_cast<const volatile T*>(from);
}

// The runtime ------------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
union cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// Few multiprocessors, so that small inputs have blocks with more than one piece of work.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 2 : 9;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  return *blocks = 4, cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                                     std::size_t width, std::size_t height, cudaMemcpyKind, cudaStream_t) {
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidValue;
  for (std::size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<std::byte*>(to) + row * to_pitch, static_cast<const std::byte*>(from) + row * from_pitch,
                width);
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemset2DAsync(void* to, std::size_t pitch, int value, std::size_t width, std::size_t height,
                                     cudaStream_t) {
  if (width > pitch) return cudaErrorInvalidValue;
  for (std::size_t row = 0; row < height; ++row) std::memset(static_cast<std::byte*>(to) + row * pitch, value, width);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cuda_emulation::Launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream)(
      kernel, std::forward<Arguments>(arguments)...);
  return cudaSuccess;
}
