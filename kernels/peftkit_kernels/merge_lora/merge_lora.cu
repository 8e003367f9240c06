// weight + scale * up @ down in place on a GPU; see reference.py for the definition.
//
// A block takes 16 rows and 256 columns. Each thread keeps the sums of its two columns over all rows in registers, in
// a chain of fused multiply-adds, one rank after the other, so that the bits are those of every other implementation.

#include "peftkit_undo.h"

#include <algorithm>
#include <tuple>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;
using peftkit::undo::kRowWarps;

constexpr int kRows = 16;
constexpr int kThreads = 128;
constexpr int kColumns = 2;  // of a thread
constexpr int kRanks = 16;   // ranks whose part of `up` is in shared memory at a time

template <class Weight, class Factor>
__global__ void __launch_bounds__(kThreads) merge(Weight* __restrict__ weight, const Factor* __restrict__ down,
                                                  const Factor* __restrict__ up, float scale, int64_t rows,
                                                  int64_t columns, int64_t rank) {
  __shared__ float part[kRows][kRanks];
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kRows;
  const int64_t column0 = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kColumns;
  float sums[kRows][kColumns] = {};
  for (int64_t k0 = 0; k0 < rank; k0 += kRanks) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kRanks), rank - k0));
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
      const int row = i / kRanks, k = i % kRanks;
      const bool inside = row0 + row < rows && k < count;
      part[row][k] = inside ? peftkit::widen(up[(row0 + row) * rank + k0 + k]) : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < count; ++k) {
      float values[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const bool inside = column0 + c < columns;
        values[c] = inside ? peftkit::widen(down[(k0 + k) * columns + column0 + c]) : 0.0f;
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[row][c] = __fmaf_rn(part[row][k], values[c], sums[row][c]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (row0 + row >= rows) break;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (column0 + c >= columns) break;
      Weight& own = weight[(row0 + row) * columns + column0 + c];
      own = peftkit::narrow<Weight>(__fadd_rn(peftkit::widen(own), __fmul_rn(sums[row][c], scale)));
    }
  }
}

void check(const Tensor& weight, const Tensor& down, const Tensor& up) {
  STD_TORCH_CHECK(weight.is_contiguous() && down.is_contiguous() && up.is_contiguous(),
                  "merge_lora_: compiled code takes contiguous tensors");
  STD_TORCH_CHECK(weight.dim() == 2 && down.dim() == 2 && up.dim() == 2 && down.size(0) == up.size(1) &&
                      weight.size(0) == up.size(0) && weight.size(1) == down.size(1) &&
                      down.scalar_type() == up.scalar_type(),
                  "merge_lora_: expected weight (out, in), down (r, in) and up (out, r), the last two of one dtype");
}

// Calls `use` with null pointers of the types of a weight and of its factors.
template <class Use>
void with_types(const Tensor& weight, const Tensor& factor, Use&& use) {
  peftkit::with_type(weight.scalar_type(), "merge_lora_", [&](auto* w) {
    peftkit::with_type(factor.scalar_type(), "merge_lora_", [&](auto* f) { use(w, f); });
  });
}

void launch(Tensor weight, Tensor down, Tensor up, double scale) {
  check(weight, down, up);
  const int64_t rows = weight.size(0), columns = weight.size(1), rank = down.size(0);
  if (rows == 0 || columns == 0) return;
  const peftkit::OnDevice device(weight);
  const dim3 blocks(static_cast<unsigned>((columns + kThreads * kColumns - 1) / (kThreads * kColumns)),
                    static_cast<unsigned>((rows + kRows - 1) / kRows));
  with_types(weight, down, [&](auto* w, auto* f) {
    using Weight = std::remove_pointer_t<decltype(w)>;
    using Factor = std::remove_pointer_t<decltype(f)>;
    merge<Weight, Factor><<<blocks, kThreads, 0, device.stream()>>>(
        static_cast<Weight*>(weight.mutable_data_ptr()), static_cast<const Factor*>(down.const_data_ptr()),
        static_cast<const Factor*>(up.const_data_ptr()), static_cast<float>(scale), rows, columns, rank);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor checksum(Tensor tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.dim() == 2, "checksum: compiled code takes contiguous matrices");
  Tensor sum = torch::stable::new_zeros(tensor, {1}, std::make_optional(ScalarType::Long));
  if (tensor.numel() == 0) return sum;
  const peftkit::OnDevice device(tensor);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((tensor.numel() + 2047) / 2048, 2048));
  auto* to = static_cast<unsigned long long*>(sum.mutable_data_ptr());
  peftkit::with_type(tensor.scalar_type(), "checksum", [&](auto* tag) {
    using Word = std::conditional_t<sizeof(*tag) == 2, uint16_t, uint32_t>;
    peftkit::undo::add_words<Word><<<blocks, 256, 0, device.stream()>>>(
        static_cast<const Word*>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1), to);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return sum;
}

unsigned row_blocks(int64_t rows) { return static_cast<unsigned>((rows + kRowWarps - 1) / kRowWarps); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> merge_reversibly(Tensor weight, Tensor down, Tensor up, double scale) {
  check(weight, down, up);
  const int64_t rows = weight.size(0), columns = weight.size(1), rank = down.size(0);
  const ScalarType bits = weight.element_size() == 2 ? ScalarType::Short : ScalarType::Int;
  Tensor before = checksum(weight);
  Tensor starts = torch::stable::new_zeros(weight, {3, rows + 1}, std::make_optional(ScalarType::Int));
  const auto made = [&](int64_t count, ScalarType type) {
    return torch::stable::new_empty(weight, {count}, std::make_optional(type));
  };
  if (rows == 0) return {made(0, ScalarType::Byte), made(0, ScalarType::Char), made(0, bits), starts, before};
  const peftkit::OnDevice device(weight);
  auto* at = static_cast<int*>(starts.mutable_data_ptr());
  const auto run = [&](auto writes, uint8_t* gaps, int8_t* codes, void* escapes) {
    with_types(weight, down, [&](auto* w, auto* f) {
      using Weight = std::remove_pointer_t<decltype(w)>;
      using Factor = std::remove_pointer_t<decltype(f)>;
      constexpr bool kWrite = decltype(writes)::value;
      peftkit::undo::keep<Weight, Factor, kWrite><<<row_blocks(rows), 32 * kRowWarps, 0, device.stream()>>>(
          static_cast<Weight*>(weight.mutable_data_ptr()), static_cast<const Factor*>(down.const_data_ptr()),
          static_cast<const Factor*>(up.const_data_ptr()), static_cast<float>(scale), rows, columns, rank, at, gaps,
          codes, static_cast<peftkit::undo::Bits<Weight>*>(escapes));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  run(std::false_type{}, nullptr, nullptr, nullptr);
  peftkit::undo::add_up<<<3, 32, 0, device.stream()>>>(at, rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  int counts[3];
  for (int i = 0; i < 3; ++i) {
    STD_CUDA_CHECK(cudaMemcpyAsync(counts + i, at + i * (rows + 1) + rows, sizeof(int), cudaMemcpyDeviceToHost,
                                   device.stream()));
  }
  STD_CUDA_CHECK(cudaStreamSynchronize(device.stream()));
  Tensor gaps = made(counts[0], ScalarType::Byte), codes = made(counts[1], ScalarType::Char), escapes = made(counts[2], bits);
  run(std::true_type{}, static_cast<uint8_t*>(gaps.mutable_data_ptr()), static_cast<int8_t*>(codes.mutable_data_ptr()),
      escapes.mutable_data_ptr());
  return {gaps, codes, escapes, starts, before};
}

Tensor unmerge(Tensor weight, Tensor down, Tensor up, double scale, Tensor gaps, Tensor codes, Tensor escapes,
               Tensor starts) {
  check(weight, down, up);
  const int64_t rows = weight.size(0), columns = weight.size(1), rank = down.size(0);
  const ScalarType bits = weight.element_size() == 2 ? ScalarType::Short : ScalarType::Int;
  STD_TORCH_CHECK(gaps.is_contiguous() && codes.is_contiguous() && escapes.is_contiguous() && starts.is_contiguous() &&
                      gaps.scalar_type() == ScalarType::Byte && codes.scalar_type() == ScalarType::Char &&
                      escapes.scalar_type() == bits && starts.scalar_type() == ScalarType::Int &&
                      starts.numel() == 3 * (rows + 1),
                  "unmerge_lora_: expected the gaps, codes, escapes and starts of merge_lora_reversibly_");
  if (rows == 0 || columns == 0) return checksum(weight);
  const peftkit::OnDevice device(weight);
  with_types(weight, down, [&](auto* w, auto* f) {
    using Weight = std::remove_pointer_t<decltype(w)>;
    using Factor = std::remove_pointer_t<decltype(f)>;
    peftkit::undo::restore<Weight, Factor><<<row_blocks(rows), 32 * kRowWarps, 0, device.stream()>>>(
        static_cast<Weight*>(weight.mutable_data_ptr()), static_cast<const Factor*>(down.const_data_ptr()),
        static_cast<const Factor*>(up.const_data_ptr()), static_cast<float>(scale), rows, columns, rank,
        static_cast<const int*>(starts.const_data_ptr()), static_cast<const uint8_t*>(gaps.const_data_ptr()),
        gaps.numel(), static_cast<const int8_t*>(codes.const_data_ptr()), codes.numel(),
        static_cast<const peftkit::undo::Bits<Weight>*>(escapes.const_data_ptr()), escapes.numel());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return checksum(weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CUDA, library) {
  library.impl("merge_lora_", TORCH_BOX(&launch));
  library.impl("merge_lora_reversibly_", TORCH_BOX(&merge_reversibly));
  library.impl("unmerge_lora_", TORCH_BOX(&unmerge));
  library.impl("checksum", TORCH_BOX(&checksum));
}
