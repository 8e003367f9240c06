// Attention over all keys from that over two parts of them, on a GPU; see reference.py for the definition.
//
// A warp takes one row of the output. The parts have any strides, so that folded heads are put in order on the way.

#include "peftkit_cuda.h"

#include <tuple>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int kWarps = 4;

// A tensor (batch, heads_kv, group, queries, ...) of any strides.
struct Steps {
  int64_t of[4];
  __device__ int64_t at(const int64_t (&place)[4]) const {
    return place[0] * of[0] + place[1] * of[1] + place[2] * of[2] + place[3] * of[3];
  }
};

struct Sizes {
  int64_t batch, heads, group, queries, width;
};

// One part: its output and the logarithms of its denominators.
template <class T>
struct Part {
  const T* out;
  const float* sums;
  Steps out_steps, sums_steps;
};

template <class T>
__global__ void __launch_bounds__(kWarps * 32) merge_kernel(Sizes sizes, Part<T> first, Part<T> second,
                                                            T* __restrict__ out, float* __restrict__ sums) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= sizes.batch * sizes.heads * sizes.group * sizes.queries) return;
  const int lane = threadIdx.x % 32;
  // In the order of the output: batch, queries, heads_kv, group.
  int64_t rest = row;
  const int64_t group = rest % sizes.group;
  rest /= sizes.group;
  const int64_t head = rest % sizes.heads;
  rest /= sizes.heads;
  const int64_t place[4] = {rest / sizes.queries, head, group, rest % sizes.queries};
  const float a = first.sums[first.sums_steps.at(place)], b = second.sums[second.sums_steps.at(place)];
  const float high = fmaxf(a, b);
  const float base = high == -INFINITY ? 0.0f : high;
  const float by_a = expf(a - base), by_b = expf(b - base), whole = by_a + by_b;
  const float inverse = whole > 0.0f ? 1.0f / whole : 0.0f;
  const T* one = first.out + first.out_steps.at(place);
  const T* other = second.out + second.out_steps.at(place);
  for (int64_t i = lane; i < sizes.width; i += 32) {
    const float value = by_a * inverse * peftkit::widen(one[i]) + by_b * inverse * peftkit::widen(other[i]);
    out[row * sizes.width + i] = peftkit::narrow<T>(value);
  }
  if (lane == 0) {
    const int64_t own = ((place[0] * sizes.heads + head) * sizes.group + group) * sizes.queries + place[3];
    sums[own] = base + logf(whole);
  }
}

Steps steps_of(const Tensor& tensor) {
  return {{tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

template <class T>
Part<T> part_of(const Tensor& out, const Tensor& sums) {
  return {static_cast<const T*>(out.const_data_ptr()), static_cast<const float*>(sums.const_data_ptr()), steps_of(out),
          steps_of(sums)};
}

bool same_sizes(const Tensor& a, const Tensor& b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

std::tuple<Tensor, Tensor> merge(Tensor first, Tensor first_sums, Tensor second, Tensor second_sums) {
  STD_TORCH_CHECK(first.dim() == 5 && second.dim() == 5 && first_sums.dim() == 4 && second_sums.dim() == 4 &&
                      same_sizes(first, second, 5) && same_sizes(first, first_sums, 4) &&
                      same_sizes(first, second_sums, 4) && first.scalar_type() == second.scalar_type() &&
                      first_sums.scalar_type() == ScalarType::Float && second_sums.scalar_type() == ScalarType::Float,
                  "prefix_attention: expected two parts (batch, heads_kv, group, queries, head_dim) of one dtype and "
                  "their sums without the last dimension in float32");
  const Sizes sizes{first.size(0), first.size(1), first.size(2), first.size(3), first.size(4)};
  STD_TORCH_CHECK(sizes.width <= 1 || (first.stride(4) == 1 && second.stride(4) == 1),
                  "prefix_attention: the last dimension must be contiguous");
  const peftkit::OnDevice device(first);
  Tensor out = torch::stable::new_empty(first, {sizes.batch, sizes.queries, sizes.heads, sizes.group, sizes.width});
  Tensor sums = torch::stable::new_empty(first_sums, {sizes.batch, sizes.heads, sizes.group, sizes.queries});
  const int64_t rows = sizes.batch * sizes.heads * sizes.group * sizes.queries;
  if (rows == 0) return {out, sums};
  peftkit::with_type(first.scalar_type(), "prefix_attention", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    merge_kernel<T><<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), kWarps * 32, 0, device.stream()>>>(
        sizes, part_of<T>(first, first_sums), part_of<T>(second, second_sums), static_cast<T*>(out.mutable_data_ptr()),
        static_cast<float*>(sums.mutable_data_ptr()));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CUDA, library) { library.impl("prefix_attention_merge", TORCH_BOX(&merge)); }
