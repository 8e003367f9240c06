// Low-rank updates whose adapter differs from row to row; see reference.py for the definition.
//
// Rows are sorted into segments of one adapter each, so that a factor is read once a segment and what the batch does
// not use is not touched. A unit of parallel work is a few ranks (shrink) or a few columns (expand, outer) of one
// segment. The kernels keep a small block of sums in registers; the file includes itself once for each kind of
// processor.
//
// Long segments take the same kernels: a library's product with a float32 result has float32 factors, and converting
// them and the rows costs more than the product of a low rank.

#ifndef PEFTKIT_PASS

#include "peftkit_cpu.h"

#include <algorithm>
#include <type_traits>
#include <utility>

namespace {

using peftkit::Bits;
using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int64_t kRowUnit = 32;   // rows of a segment that one unit of work takes at most
constexpr int64_t kRankUnit = 8;   // ranks of a unit at most
constexpr int64_t kColumns = 1024; // columns of a unit at most
constexpr int64_t kRowBlock = 4;   // rows whose sums `expand` keeps at a time

}  // namespace

#define PEFTKIT_FILE "../multi_lora/multi_lora.cpp"
#include "peftkit_passes.h"

namespace {

// The rows of one adapter: order[begin] to order[end - 1].
struct Segment {
  int64_t adapter, begin, end, start, rank;
};

struct Batch {
  std::vector<int64_t> order;
  std::vector<Segment> segments;
};

Batch sorted(const Tensor& adapter, const Tensor& starts, int64_t total, int64_t max_rank) {
  STD_TORCH_CHECK(adapter.dim() == 1 && adapter.is_contiguous() && adapter.scalar_type() == ScalarType::Long &&
                      starts.dim() == 1 && starts.is_contiguous() && starts.scalar_type() == ScalarType::Long &&
                      starts.numel() >= 1,
                  "multi_lora: adapter and starts must be contiguous vectors of int64");
  const auto* index = static_cast<const int64_t*>(adapter.const_data_ptr());
  const auto* start = static_cast<const int64_t*>(starts.const_data_ptr());
  const int64_t count = starts.numel() - 1;
  Batch batch;
  std::vector<std::pair<int64_t, int64_t>> keys;
  keys.reserve(adapter.numel());
  bool in_order = true;
  for (int64_t row = 0; row < adapter.numel(); ++row) {
    STD_TORCH_CHECK(index[row] >= -1 && index[row] < count, "multi_lora: row ", row, " names adapter ", index[row],
                    " of ", count);
    if (index[row] < 0) continue;
    in_order = in_order && (keys.empty() || keys.back().first <= index[row]);
    keys.emplace_back(index[row], row);
  }
  if (!in_order) std::sort(keys.begin(), keys.end());
  batch.order.reserve(keys.size());
  for (const auto& [own, row] : keys) {
    const int64_t place = static_cast<int64_t>(batch.order.size());
    if (batch.segments.empty() || batch.segments.back().adapter != own) {
      const int64_t rank = start[own + 1] - start[own];
      STD_TORCH_CHECK(start[own] >= 0 && rank >= 0 && rank <= max_rank && start[own + 1] <= total,
                      "multi_lora: adapter ", own, " has the ranks from ", start[own], " to ", start[own + 1],
                      "; expected at most ", max_rank, " of ", total);
      batch.segments.push_back({own, place, place, start[own], rank});
    }
    batch.order.push_back(row);
    batch.segments.back().end = place + 1;
  }
  return batch;
}

// A part of a segment: rows of the order, and ranks or columns.
struct Unit {
  const Segment* segment;
  int64_t begin, end, first, last;
};

int64_t grain(size_t units, int64_t work) {
  // About 16k multiplications are worth a thread's while.
  const int64_t own = std::max<int64_t>(1, work / std::max<int64_t>(1, static_cast<int64_t>(units)));
  return std::max<int64_t>(1, 16384 / own);
}

int64_t work_of(const Batch& batch, int64_t width) {
  int64_t work = 0;
  for (const Segment& segment : batch.segments) work += (segment.end - segment.begin) * segment.rank * width;
  return work;
}

template <class Work>
void each(const std::vector<Unit>& units, int64_t work, Work&& call) {
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), grain(units.size(), work),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) call(units[i]);
                              });
}

// The largest of `most`, `most` / 2 and `most` / 4 of which there are two for each thread.
int64_t step_of(int64_t count, int64_t most) {
  const int64_t wanted = 2 * static_cast<int64_t>(torch::stable::get_num_threads());
  int64_t step = most;
  while (step > most / 4 && count / step < wanted) step /= 2;
  return step;
}

void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), "multi_lora: compiled code takes ", name,
                  " as a contiguous matrix");
}

Tensor shrink(Tensor x, Tensor factor, Tensor starts, Tensor adapter, int64_t max_rank) {
  check_matrix(x, "x");
  check_matrix(factor, "a factor");
  const int64_t rows = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(factor.size(1) == width && adapter.numel() == rows && max_rank >= 0,
                  "multi_lora: expected x (rows, width), a factor (total rank, width) and adapter (rows,)");
  const Batch batch = sorted(adapter, starts, factor.size(0), max_rank);
  Tensor hidden = torch::stable::new_empty(x, {rows, max_rank}, std::make_optional(ScalarType::Float));
  auto* to = static_cast<float*>(hidden.mutable_data_ptr());
  std::fill_n(to, rows * max_rank, 0.0f);
  std::vector<Unit> units;
  const int64_t ranks = step_of(static_cast<int64_t>(batch.segments.size()) * max_rank, kRankUnit);
  for (const Segment& segment : batch.segments) {
    for (int64_t row = segment.begin; row < segment.end; row += kRowUnit) {
      for (int64_t k = 0; k < segment.rank; k += ranks) {
        units.push_back({&segment, row, std::min(row + kRowUnit, segment.end), k, std::min(k + ranks, segment.rank)});
      }
    }
  }
  peftkit::with_format(x.scalar_type(), "multi_lora", [&](auto x_format) {
    peftkit::with_format(factor.scalar_type(), "multi_lora", [&](auto factor_format) {
      using X = decltype(x_format);
      using Factor = decltype(factor_format);
      const auto* values = static_cast<const Bits<X>*>(x.const_data_ptr());
      const auto* factors = static_cast<const Bits<Factor>*>(factor.const_data_ptr());
      each(units, work_of(batch, width), [&](const Unit& unit) {
        PEFTKIT_RUN(dots<X, Factor>(values, batch.order.data() + unit.begin, unit.end - unit.begin,
                     factors + (unit.segment->start + unit.first) * width, unit.last - unit.first, width,
                     to + unit.first, max_rank));
      });
    });
  });
  return hidden;
}

std::vector<Unit> by_columns(const Batch& batch, int64_t width, bool by_rows) {
  std::vector<Unit> units;
  const int64_t columns = step_of(static_cast<int64_t>(batch.segments.size()) * width, kColumns);
  for (const Segment& segment : batch.segments) {
    const int64_t step = by_rows ? kRowUnit : segment.end - segment.begin;
    for (int64_t row = segment.begin; row < segment.end; row += step) {
      for (int64_t column = 0; column < width; column += columns) {
        units.push_back({&segment, row, std::min(row + step, segment.end), column, std::min(column + columns, width)});
      }
    }
  }
  return units;
}

void check_hidden(const Tensor& hidden, const Tensor& scales, const Tensor& starts, const Tensor& adapter) {
  check_matrix(hidden, "the intermediate");
  STD_TORCH_CHECK(hidden.scalar_type() == ScalarType::Float && scales.scalar_type() == ScalarType::Float &&
                      scales.is_contiguous() && scales.dim() == 1 && scales.numel() + 1 == starts.numel() &&
                      adapter.numel() == hidden.size(0),
                  "multi_lora: expected an intermediate (rows, max rank) and scales (adapters,) in float32");
}

void expand(Tensor out, Tensor hidden, Tensor factor, Tensor starts, Tensor scales, Tensor adapter) {
  check_matrix(out, "out");
  check_matrix(factor, "a factor");
  check_hidden(hidden, scales, starts, adapter);
  const int64_t width = out.size(1), max_rank = hidden.size(1);
  STD_TORCH_CHECK(factor.size(1) == width && out.size(0) == hidden.size(0),
                  "multi_lora: expected out (rows, width) and a factor (total rank, width)");
  const Batch batch = sorted(adapter, starts, factor.size(0), max_rank);
  const auto* from = static_cast<const float*>(hidden.const_data_ptr());
  const auto* scale = static_cast<const float*>(scales.const_data_ptr());
  const std::vector<Unit> units = by_columns(batch, width, true);
  peftkit::with_format(out.scalar_type(), "multi_lora", [&](auto out_format) {
    peftkit::with_format(factor.scalar_type(), "multi_lora", [&](auto factor_format) {
      using Out = decltype(out_format);
      using Factor = decltype(factor_format);
      auto* to = static_cast<Bits<Out>*>(out.mutable_data_ptr());
      const auto* factors = static_cast<const Bits<Factor>*>(factor.const_data_ptr());
      each(units, work_of(batch, width), [&](const Unit& unit) {
        PEFTKIT_RUN(sums<Out, Factor>(to + unit.first, width, batch.order.data() + unit.begin,
                     unit.end - unit.begin, from, max_rank, scale[unit.segment->adapter],
                     factors + unit.segment->start * width + unit.first, unit.segment->rank, unit.last - unit.first));
      });
    });
  });
}

Tensor outer(Tensor hidden, Tensor y, Tensor like, Tensor starts, Tensor scales, Tensor adapter) {
  check_matrix(y, "y");
  check_matrix(like, "a factor");
  check_hidden(hidden, scales, starts, adapter);
  const int64_t width = y.size(1), max_rank = hidden.size(1);
  STD_TORCH_CHECK(like.size(1) == width && y.size(0) == hidden.size(0),
                  "multi_lora: expected y (rows, width) and a factor (total rank, width)");
  const Batch batch = sorted(adapter, starts, like.size(0), max_rank);
  Tensor found = torch::stable::new_zeros(like, {like.size(0), width});
  const auto* from = static_cast<const float*>(hidden.const_data_ptr());
  const auto* scale = static_cast<const float*>(scales.const_data_ptr());
  const std::vector<Unit> units = by_columns(batch, width, false);
  peftkit::with_format(y.scalar_type(), "multi_lora", [&](auto y_format) {
    peftkit::with_format(like.scalar_type(), "multi_lora", [&](auto factor_format) {
      using Y = decltype(y_format);
      using Factor = decltype(factor_format);
      const auto* values = static_cast<const Bits<Y>*>(y.const_data_ptr());
      auto* to = static_cast<Bits<Factor>*>(found.mutable_data_ptr());
      each(units, work_of(batch, width), [&](const Unit& unit) {
        PEFTKIT_RUN(products<Y, Factor>(values + unit.first, width, batch.order.data() + unit.begin,
                     unit.end - unit.begin, from, max_rank, scale[unit.segment->adapter],
                     to + unit.segment->start * width + unit.first, unit.segment->rank, unit.last - unit.first));
      });
    });
  });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CPU, library) {
  library.impl("multi_lora_shrink", TORCH_BOX(&shrink));
  library.impl("multi_lora_expand_", TORCH_BOX(&expand));
  library.impl("multi_lora_outer", TORCH_BOX(&outer));
}

#else  // one pass: the kernels for one kind of processor

namespace {
namespace PEFTKIT_NAME {

#include "peftkit_lanes.h"

constexpr int kSums = PEFTKIT_PASS == 512 ? 16 : PEFTKIT_PASS == 256 ? 8 : 4;  // sums in registers beside what they are made of

// out[row[i]][k] = factor[k] · x[row[i]] for R rows and K ranks.
template <class X, class Factor, int R, int K>
PEFTKIT_TARGET void dot_block(const Bits<X>* x, const int64_t* row, const Bits<Factor>* factor, int64_t width,
                              float* out, int64_t stride) {
  const Bits<X>* own[R];
  for (int i = 0; i < R; ++i) own[i] = x + row[i] * width;
  Lanes sum[R][K];
  for (int i = 0; i < R; ++i) {
    for (int k = 0; k < K; ++k) sum[i][k] = zero();
  }
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    Lanes value[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) value[i] = take<X>(own[i] + at);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const Lanes other = take<Factor>(factor + k * width + at);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sum[i][k] = fma(value[i], other, sum[i][k]);
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int k = 0; k < K; ++k) {
      float whole = total(sum[i][k]);
      for (int64_t j = at; j < width; ++j) whole += X::load(own[i][j]) * Factor::load(factor[k * width + j]);
      out[row[i] * stride + k] = whole;
    }
  }
}

template <class X, class Factor, int R, int K>
PEFTKIT_TARGET PEFTKIT_INLINE void dot_ranks(const Bits<X>* x, const int64_t* row, const Bits<Factor>* factor,
                                             int64_t rank, int64_t width, float* out, int64_t stride) {
  int64_t k = 0;
  for (; k + K <= rank; k += K) dot_block<X, Factor, R, K>(x, row, factor + k * width, width, out + k, stride);
  if constexpr (K > 1) {
    constexpr int fewer = K == 8 ? 4 : 1;
    if (k < rank) dot_ranks<X, Factor, R, fewer>(x, row, factor + k * width, rank - k, width, out + k, stride);
  }
}

// The same for any number of rows and ranks.
template <class X, class Factor>
PEFTKIT_TARGET void dots(const Bits<X>* x, const int64_t* row, int64_t rows, const Bits<Factor>* factor, int64_t rank,
                         int64_t width, float* out, int64_t stride) {
  int64_t i = 0;
  if constexpr (kSums >= 8) {
    for (; i + 4 <= rows; i += 4) dot_ranks<X, Factor, 4, kSums / 4>(x, row + i, factor, rank, width, out, stride);
    for (; i + 2 <= rows; i += 2) dot_ranks<X, Factor, 2, kSums / 2>(x, row + i, factor, rank, width, out, stride);
  }
  for (; i < rows; ++i) {
    dot_ranks<X, Factor, 1, (kSums < 8 ? kSums : 8)>(x, row + i, factor, rank, width, out, stride);
  }
}

// sum[i][j] += sum_k by[i][k] factor[k][j] for R rows and K ranks; the sums stand kColumns apart.
template <class Factor, int R, int K>
PEFTKIT_TARGET void sum_block(float* sum, const float* by, int64_t by_stride, const Bits<Factor>* factor, int64_t width,
                              int64_t columns) {
  Lanes scaled[R][K];
  for (int i = 0; i < R; ++i) {
    for (int k = 0; k < K; ++k) scaled[i][k] = all(by[i * by_stride + k]);
  }
  int64_t at = 0;
  for (; at + kLanes <= columns; at += kLanes) {
    Lanes own[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) own[i] = take_float(sum + i * kColumns + at);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const Lanes other = take<Factor>(factor + k * width + at);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) own[i] = fma(scaled[i][k], other, own[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) put(sum + i * kColumns + at, own[i]);
  }
  for (; at < columns; ++at) {
    for (int i = 0; i < R; ++i) {
      for (int k = 0; k < K; ++k) {
        sum[i * kColumns + at] += by[i * by_stride + k] * Factor::load(factor[k * width + at]);
      }
    }
  }
}

template <class Factor, int R, int K>
PEFTKIT_TARGET PEFTKIT_INLINE void sum_ranks(float* sum, const float* by, int64_t by_stride, const Bits<Factor>* factor,
                                             int64_t rank, int64_t width, int64_t columns) {
  int64_t k = 0;
  for (; k + K <= rank; k += K) sum_block<Factor, R, K>(sum, by + k, by_stride, factor + k * width, width, columns);
  if constexpr (K > 1) {
    constexpr int fewer = K == 8 ? 4 : 1;
    if (k < rank) sum_ranks<Factor, R, fewer>(sum, by + k, by_stride, factor + k * width, rank - k, width, columns);
  }
}

template <class Out>
PEFTKIT_TARGET void add_to(Bits<Out>* out, const float* sum, int64_t count) {
  for (int64_t j = 0; j < count; ++j) out[j] = Out::store(Out::load(out[j]) + sum[j]);
}

template <class Out>
PEFTKIT_TARGET void write_to(Bits<Out>* out, const float* sum, int64_t count) {
  for (int64_t j = 0; j < count; ++j) out[j] = Out::store(sum[j]);
}

// out[row[i]][j] += scale * sum_k hidden[row[i]][k] factor[k][j] for at most kColumns columns.
template <class Out, class Factor>
PEFTKIT_TARGET void sums(Bits<Out>* out, int64_t width, const int64_t* row, int64_t rows, const float* hidden,
                         int64_t max_rank, float scale, const Bits<Factor>* factor, int64_t rank, int64_t columns) {
  float sum[kRowBlock * kColumns];
  static thread_local std::vector<float> by;
  by.resize(kRowBlock * rank);
  for (int64_t i = 0; i < rows;) {
    const int64_t count = rows - i >= 4 ? 4 : rows - i >= 2 ? 2 : 1;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t k = 0; k < rank; ++k) by[r * rank + k] = scale * hidden[row[i + r] * max_rank + k];
      std::fill_n(sum + r * kColumns, columns, 0.0f);
    }
    if (count == 4) {
      sum_ranks<Factor, 4, kSums / 4>(sum, by.data(), rank, factor, rank, width, columns);
    } else if (count == 2) {
      sum_ranks<Factor, 2, kSums / 2>(sum, by.data(), rank, factor, rank, width, columns);
    } else {
      sum_ranks<Factor, 1, (kSums < 8 ? kSums : 8)>(sum, by.data(), rank, factor, rank, width, columns);
    }
    for (int64_t r = 0; r < count; ++r) add_to<Out>(out + row[i + r] * width, sum + r * kColumns, columns);
    i += count;
  }
}

// out[k][j] = scale * sum_i hidden[row[i]][k] y[row[i]][j]: the same kernel with rows and ranks in each other's place.
template <class Y, class Factor>
PEFTKIT_TARGET void products(const Bits<Y>* y, int64_t width, const int64_t* row, int64_t rows, const float* hidden,
                             int64_t max_rank, float scale, Bits<Factor>* out, int64_t rank, int64_t columns) {
  float sum[kRowBlock * kColumns];
  for (int64_t k = 0; k < rank; k += kRowBlock) {
    const int64_t count = std::min(kRowBlock, rank - k);
    std::fill_n(sum, count * kColumns, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      float by[kRowBlock];
      for (int64_t r = 0; r < count; ++r) by[r] = scale * hidden[row[i] * max_rank + k + r];
      const Bits<Y>* own = y + row[i] * width;
      if (count == 4) {
        sum_block<Y, 4, 1>(sum, by, 1, own, width, columns);
      } else {
        for (int64_t r = 0; r < count; ++r) sum_block<Y, 1, 1>(sum + r * kColumns, by + r, 1, own, width, columns);
      }
    }
    for (int64_t r = 0; r < count; ++r) write_to<Factor>(out + (k + r) * width, sum + r * kColumns, columns);
  }
}

}  // namespace PEFTKIT_NAME
}  // namespace

#endif
