// CUDA's threads on one thread of the CPU, for the logic of kernels and not for their speed.
//
// Every thread of a block is a fiber that runs until it waits for others. The order in which waiting fibers go on is
// shuffled, so that what depends on an order that nothing guarantees comes out wrong. Several blocks are under way at a
// time, admitted in the order of their indices. Found here and silent or fatal on a GPU: barriers that some threads do
// not reach, or reach at another place; shuffles that name lanes that have ended or do something else; waiting for ever;
// shared memory that is read before it is written (it begins as NaN); launches that a GPU refuses. Compiled with
// sanitizers also every access outside shared and global memory, and vectors that are not aligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

namespace cuda_emulation {

constexpr unsigned kWarp = 32;
constexpr std::size_t kBrought = 32;  // bytes that a lane can bring to a meeting

using Where = std::source_location;

[[noreturn]] void fail(const std::string& what);

// Of the thread that runs. Its number counts x first.
const uint3& threadIdx();
const uint3& blockIdx();
const dim3& blockDim();
const dim3& gridDim();
unsigned number();

// Waits for every thread of the block that has not ended.
void barrier(const Where& where);

// Lets others run.
void sleep(const Where& where);

// Waits for the lanes of the mask; what lane i of the warp brought is at kBrought * i from the result.
const std::byte* meet(unsigned mask, const void* value, std::size_t bytes, const char* kind, const Where& where);

// The block's own memory for one declaration, at first all ones: NaN as a number.
void* shared(const char* name, std::size_t bytes, const Where& where);

// Runs the body once for each thread.
void run(dim3 blocks, dim3 threads, const std::function<void()>& body);

template <class T>
T from_lane(unsigned mask, const T& value, unsigned source, const char* kind, const Where& where) {
  const std::byte* values = meet(mask, &value, sizeof value, kind, where);
  T found;
  std::memset(&found, 0xff, sizeof found);  // a lane that takes no part gives anything
  if (source < kWarp && (mask >> source & 1u)) std::memcpy(&found, values + kBrought * source, sizeof found);
  return found;
}

template <class T>
T* shared(const char* name, const Where& where) {
  return static_cast<T*>(shared(name, sizeof(T), where));
}

// What `kernel<<<blocks, threads, shared, stream>>>(...)` becomes.
class Launch {
 public:
  Launch(dim3 blocks, dim3 threads, std::size_t shared = 0, void* = nullptr) : blocks_(blocks), threads_(threads) {
    if (shared != 0) fail("dynamic shared memory is not emulated");
  }
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments&&... arguments) const {
    const std::tuple<std::decay_t<Parameters>...> kept(std::forward<Arguments>(arguments)...);
    run(blocks_, threads_, [&] { std::apply(kernel, kept); });
  }

 private:
  dim3 blocks_, threads_;
};

}  // namespace cuda_emulation
