// Kernels with one fault each, to see that the emulation finds it: `faults NAME` prints what was found.

#include <cstdio>

#include "cuda_runtime.h"

namespace {

constexpr int kThreads = 64;
int64_t results[kThreads];

__global__ void none(int64_t* out) {
  __shared__ int64_t values[kThreads];
  values[kThreads - 1 - threadIdx.x] = threadIdx.x;
  __syncthreads();
  int64_t sum = values[threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  out[threadIdx.x] = sum;
}

__global__ void no_barrier(int64_t* out) {
  __shared__ int64_t values[kThreads];
  values[kThreads - 1 - threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void barrier_of_some(int64_t* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);
  __syncthreads();
}

__global__ void barrier_twice_for_some(int64_t* out) {
  out[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 5) __nanosleep(1);
  if (threadIdx.x != 5) __syncthreads();
  while (out[5] == 0 && threadIdx.x == 5) __nanosleep(1);
}

__global__ void ended_lane(int64_t* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);
}

__global__ void lanes_apart(int64_t* out) {
  if (threadIdx.x % 2) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, threadIdx.x, 2);
  }
}

__global__ void outside_shared(int64_t* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 0;
  const int* from = values;
  out[threadIdx.x] = from[threadIdx.x + 1];
}

__global__ void not_aligned(const float* from, int64_t* out) {
  const float4 four = *reinterpret_cast<const float4*>(from + threadIdx.x);
  out[threadIdx.x] = four.x == four.y;
}

// Blocks that wait for the first one.
__global__ void waits(volatile int* flag, int64_t* out) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) *flag = 1;
    return;
  }
  while (*flag == 0) __nanosleep(20);
  out[threadIdx.x] = 32 * 31 / 2 + (threadIdx.x < 32 ? 1024 : 0);
}

// Blocks that wait for the last one, which gets no place as long as they do.
__global__ void waits_for_the_last(volatile int* flag) {
  if (blockIdx.x == gridDim.x - 1) *flag = 1;
  while (*flag == 0) __nanosleep(20);
}

void run(const std::string& name) {
  alignas(16) static float numbers[2 * kThreads] = {};
  static int flag = 0;
  const auto plain = [&](void (*kernel)(int64_t*)) { kernel<<<1, kThreads>>>(results); };
  if (name == "none") plain(none);
  if (name == "no_barrier") plain(no_barrier);
  if (name == "barrier_of_some") plain(barrier_of_some);
  if (name == "barrier_twice_for_some") plain(barrier_twice_for_some);
  if (name == "ended_lane") plain(ended_lane);
  if (name == "lanes_apart") plain(lanes_apart);
  if (name == "outside_shared") plain(outside_shared);
  if (name == "not_aligned") not_aligned<<<1, kThreads>>>(numbers, results);
  if (name == "waits") waits<<<9, kThreads>>>(&flag, results);
  if (name == "waits_for_the_last") waits_for_the_last<<<9, kThreads>>>(&flag);
  if (name == "empty_grid") none<<<0, kThreads>>>(results);
  if (name == "too_high_a_grid") none<<<dim3(1, 65536), kThreads>>>(results);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    run(count > 1 ? arguments[1] : "none");
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  for (int i = 0; i < kThreads; ++i) {
    // The sum of the thread numbers that stand in the warp's half of the reversed array.
    const int64_t wanted = 32 * 31 / 2 + (i < 32 ? 32 * 32 : 0);
    if (results[i] != wanted) {
      std::printf("thread %d gave %lld, expected %lld\n", i, static_cast<long long>(results[i]),
                  static_cast<long long>(wanted));
      return 1;
    }
  }
  std::printf("right\n");
  return 0;
}
