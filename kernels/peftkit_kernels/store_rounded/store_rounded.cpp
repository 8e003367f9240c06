// stored <- meant, rounded once, and the sums over what was stored and what was meant; see reference.py.

#include "peftkit_cpu.h"

#include <algorithm>
#include <array>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int64_t kBlock = 4096;  // elements of which a thread takes the sums at once
constexpr int64_t kSums = 8;
constexpr int64_t kLanes = 16;
using Sums = std::array<double, kSums>;

inline int32_t not_finite(float value) {
  return (std::bit_cast<uint32_t>(value) & 0x7f800000u) == 0x7f800000u;
}

// `count` elements, kLanes of them side by side, so that each lane's sums are a chain of their own.
template <class Format>
PEFTKIT_CLONES void block(typename Format::Bits* stored, const float* meant, int64_t count, double* sums) {
  double weight[kLanes] = {}, change[kLanes] = {}, error[kLanes] = {}, product[kLanes] = {};
  int32_t changed[kLanes] = {}, bad_before[kLanes] = {}, bad_meant[kLanes] = {}, bad_after[kLanes] = {};
  const auto take = [&](int64_t i, int64_t lane) {
    const float before = Format::load(stored[i]);
    const float wanted = meant[i];
    const auto bits = Format::store(wanted);
    const float after = Format::load(bits);
    stored[i] = bits;
    const double w = before, d = static_cast<double>(wanted) - w, r = static_cast<double>(after) - w;
    weight[lane] += w * w;
    change[lane] += d * d;
    error[lane] += (r - d) * (r - d);
    product[lane] += r * d;
    changed[lane] += after != before;
    bad_before[lane] += not_finite(before);
    bad_meant[lane] += not_finite(wanted);
    bad_after[lane] += not_finite(after);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) take(i + lane, lane);
  }
  for (; i < count; ++i) take(i, i % kLanes);
  for (int64_t sum = 0; sum < kSums; ++sum) sums[sum] = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const double found[kSums] = {weight[lane],
                                 change[lane],
                                 error[lane],
                                 product[lane],
                                 static_cast<double>(changed[lane]),
                                 static_cast<double>(bad_before[lane]),
                                 static_cast<double>(bad_meant[lane]),
                                 static_cast<double>(bad_after[lane])};
    for (int64_t sum = 0; sum < kSums; ++sum) sums[sum] += found[sum];
  }
}

Tensor store(Tensor stored, Tensor meant) {
  STD_TORCH_CHECK(stored.is_contiguous() && meant.is_contiguous() && stored.numel() == meant.numel() &&
                      meant.scalar_type() == ScalarType::Float,
                  "store_rounded_: compiled code takes contiguous tensors of one size, `meant` in float32");
  const int64_t count = stored.numel(), blocks = (count + kBlock - 1) / kBlock;
  std::vector<Sums> parts(blocks);
  peftkit::with_format(stored.scalar_type(), "store_rounded_", [&](auto format) {
    using Format = decltype(format);
    auto* to = static_cast<typename Format::Bits*>(stored.mutable_data_ptr());
    const auto* from = static_cast<const float*>(meant.const_data_ptr());
    torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        block<Format>(to + i * kBlock, from + i * kBlock, std::min(kBlock, count - i * kBlock), parts[i].data());
      }
    });
  });
  Tensor out = torch::stable::new_empty(stored, {kSums}, std::make_optional(ScalarType::Double));
  auto* sums = static_cast<double*>(out.mutable_data_ptr());
  std::fill_n(sums, kSums, 0.0);
  // In the order of the blocks, so that the sums do not depend on the number of threads.
  for (const Sums& part : parts) {
    for (int64_t i = 0; i < kSums; ++i) sums[i] += part[i];
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CPU, library) { library.impl("store_rounded_", TORCH_BOX(&store)); }
