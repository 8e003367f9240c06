// Attention over a prefix and a row's own keys; see reference.py for the definition.
//
// For few queries a key head: each key and value is converted once, multiplied with all queries that see it, and the
// softmax is taken as the keys go by, so that the work is bound by reading them. The batch is the innermost of the
// loops over heads, which leaves a head's prefix in cache. For many queries torch's kernels give two parts, merged
// here. The file includes itself once for each kind of processor.

#ifndef PEFTKIT_PASS

#include "peftkit_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

namespace {

using peftkit::Bits;
using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int64_t kFew = 16;   // queries of a key head at most
constexpr int64_t kKeys = 64;  // keys whose weights are kept at a time

// Keys and values of one head, and what is added to their scores.
template <class Format>
struct Keys {
  const Bits<Format>* key;
  const Bits<Format>* value;
  int64_t key_step, value_step, count;
  const Bits<Format>* bias;  // or null
  int64_t bias_row, bias_step;
};

// What the softmax has come to: sums of weights and of weighted values, relative to the highest score so far.
struct State {
  float* query;  // (rows, width), scaled
  float* out;    // (rows, width)
  float high[kFew], total[kFew];
  int64_t rows, width;
};

// exp(x) for x <= 0, to two units in the last place; 0 where that is less than the smallest normal number. The power of
// two is found by adding 1.5 * 2^23, after which the last bits of the sum are the integer.
inline __attribute__((always_inline)) float exponential(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float power = shifted - 12582912.0f;
  const float rest = (x - power * 0.693145752f) - power * 1.42860677e-6f;
  float sum = 1.0f / 5040;
  sum = sum * rest + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const uint32_t whole = std::bit_cast<uint32_t>(shifted) - 0x4b400000u;
  const float found = std::bit_cast<float>(std::bit_cast<uint32_t>(sum) + (whole << 23));
  return x < -87.0f ? 0.0f : found;
}

}  // namespace

#define PEFTKIT_FILE "../prefix_attention/prefix_attention.cpp"
#include "peftkit_passes.h"

namespace {

template <class Format>
void attend(State& state, const Keys<Format>& keys) {
  PEFTKIT_RUN(attend<Format>(state, keys));
}

template <class Format>
PEFTKIT_CLONES void mix(const Bits<Format>* first, float by_first, const Bits<Format>* second, float by_second,
                        Bits<Format>* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = Format::store(by_first * Format::load(first[i]) + by_second * Format::load(second[i]));
  }
}

// A tensor (batch, heads_kv, group, queries, ...) of any strides.
template <class T>
struct Strided {
  const T* from;
  int64_t steps[4];

  explicit Strided(const Tensor& tensor) : from(static_cast<const T*>(tensor.const_data_ptr())) {
    for (int64_t i = 0; i < 4; ++i) steps[i] = tensor.stride(i);
  }
  const T* at(const int64_t (&place)[4]) const {
    const T* found = from;
    for (int64_t i = 0; i < 4; ++i) found += place[i] * steps[i];
    return found;
  }
};

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
  const int64_t sizes[4] = {first.size(0), first.size(1), first.size(2), first.size(3)};
  const int64_t width = first.size(4), rows = sizes[0] * sizes[1] * sizes[2] * sizes[3];
  STD_TORCH_CHECK(width <= 1 || (first.stride(4) == 1 && second.stride(4) == 1),
                  "prefix_attention: the last dimension must be contiguous");
  Tensor out = torch::stable::new_empty(first, {sizes[0], sizes[3], sizes[1], sizes[2], width});
  Tensor sums = torch::stable::new_empty(first_sums, {sizes[0], sizes[1], sizes[2], sizes[3]});
  peftkit::with_format(first.scalar_type(), "prefix_attention", [&](auto format) {
    using Format = decltype(format);
    const Strided<Bits<Format>> one(first), other(second);
    const Strided<float> one_sum(first_sums), other_sum(second_sums);
    auto* to = static_cast<Bits<Format>*>(out.mutable_data_ptr());
    auto* total = static_cast<float*>(sums.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        // In the order of the output: batch, queries, heads_kv, group.
        int64_t rest = row;
        const int64_t group = rest % sizes[2];
        rest /= sizes[2];
        const int64_t head = rest % sizes[1];
        rest /= sizes[1];
        const int64_t place[4] = {rest / sizes[3], head, group, rest % sizes[3]};
        const float a = *one_sum.at(place), b = *other_sum.at(place);
        const float high = std::max(a, b);
        const float base = high == -std::numeric_limits<float>::infinity() ? 0.0f : high;
        const float by_a = std::exp(a - base), by_b = std::exp(b - base), whole = by_a + by_b;
        const float inverse = whole > 0.0f ? 1.0f / whole : 0.0f;
        mix<Format>(one.at(place), by_a * inverse, other.at(place), by_b * inverse, to + row * width, width);
        total[((place[0] * sizes[1] + place[1]) * sizes[2] + place[2]) * sizes[3] + place[3]] = base + std::log(whole);
      }
    });
  });
  return {out, sums};
}

std::tuple<Tensor, Tensor> few(Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor key, Tensor value,
                               std::optional<Tensor> bias, double scale) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && same_sizes(key, value, 4) &&
                      prefix_key.dim() == 3 && prefix_value.dim() == 3 && same_sizes(prefix_key, prefix_value, 3),
                  "prefix_attention: expected query (batch, heads_kv, rows, head_dim), key and value (batch, heads_kv, "
                  "tokens, head_dim), and prefix_key and prefix_value (heads_kv, prefix, head_dim)");
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), width = query.size(3);
  const int64_t tokens = key.size(2), prefix = prefix_key.size(1);
  STD_TORCH_CHECK(key.size(0) == batch && key.size(1) == heads && key.size(3) == width && rows <= kFew &&
                      prefix_key.size(0) == heads && prefix_key.size(2) == width && prefix + tokens > 0,
                  "prefix_attention: sizes do not fit together, or more than ", kFew, " queries a key head");
  for (const Tensor* tensor : {&prefix_key, &prefix_value, &key, &value}) {
    STD_TORCH_CHECK(tensor->scalar_type() == query.scalar_type() &&
                        (width <= 1 || tensor->stride(tensor->dim() - 1) == 1),
                    "prefix_attention: expected one dtype and contiguous last dimensions");
  }
  STD_TORCH_CHECK(width <= 1 || query.stride(3) == 1, "prefix_attention: expected contiguous last dimensions");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 4 && bias->scalar_type() == query.scalar_type(),
                    "prefix_attention: expected a bias of 4 dimensions and the dtype of query");
    const int64_t wanted[4] = {batch, heads, rows, tokens};
    for (int64_t i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(bias->size(i) == 1 || bias->size(i) == wanted[i], "prefix_attention: the bias does not fit");
    }
  }
  Tensor out = torch::stable::new_empty(query, {batch, heads, rows, width});
  Tensor sums = torch::stable::new_empty(query, {batch, heads, rows}, std::make_optional(ScalarType::Float));
  const int64_t work = std::max<int64_t>(1, (prefix + tokens) * rows * width);
  peftkit::with_format(query.scalar_type(), "prefix_attention", [&](auto format) {
    using Format = decltype(format);
    const auto* queries = static_cast<const Bits<Format>*>(query.const_data_ptr());
    const auto* shared_keys = static_cast<const Bits<Format>*>(prefix_key.const_data_ptr());
    const auto* shared_values = static_cast<const Bits<Format>*>(prefix_value.const_data_ptr());
    const auto* own_keys = static_cast<const Bits<Format>*>(key.const_data_ptr());
    const auto* own_values = static_cast<const Bits<Format>*>(value.const_data_ptr());
    const auto* biases = bias.has_value() ? static_cast<const Bits<Format>*>(bias->const_data_ptr()) : nullptr;
    auto step = [&](int64_t i) { return biases == nullptr || bias->size(i) == 1 ? 0 : bias->stride(i); };
    const int64_t steps[4] = {step(0), step(1), step(2), step(3)};
    auto* to = static_cast<Bits<Format>*>(out.mutable_data_ptr());
    auto* total = static_cast<float*>(sums.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, 16384 / work);
    torch::stable::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
      static thread_local std::vector<float> kept;
      kept.resize(2 * kFew * width);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t head = unit / batch, row = unit % batch;
        State state{kept.data(), kept.data() + kFew * width, {}, {}, rows, width};
        std::fill_n(state.out, rows * width, 0.0f);
        for (int64_t i = 0; i < rows; ++i) {
          const auto* from = queries + row * query.stride(0) + head * query.stride(1) + i * query.stride(2);
          for (int64_t j = 0; j < width; ++j) {
            state.query[i * width + j] = Format::load(from[j]) * static_cast<float>(scale);
          }
          state.high[i] = -std::numeric_limits<float>::infinity();
          state.total[i] = 0.0f;
        }
        attend<Format>(state, {shared_keys + head * prefix_key.stride(0), shared_values + head * prefix_value.stride(0),
                               prefix_key.stride(1), prefix_value.stride(1), prefix, nullptr, 0, 0});
        attend<Format>(state, {own_keys + row * key.stride(0) + head * key.stride(1),
                               own_values + row * value.stride(0) + head * value.stride(1), key.stride(2),
                               value.stride(2), tokens,
                               biases == nullptr ? nullptr : biases + row * steps[0] + head * steps[1], steps[2],
                               steps[3]});
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t place = (row * heads + head) * rows + i;
          const float inverse = 1.0f / state.total[i];
          for (int64_t j = 0; j < width; ++j) {
            to[place * width + j] = Format::store(state.out[i * width + j] * inverse);
          }
          total[place] = state.high[i] + std::log(state.total[i]);
        }
      }
    });
  });
  return {out, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CPU, library) {
  library.impl("prefix_attention_merge", TORCH_BOX(&merge));
  library.impl("prefix_attention_few", TORCH_BOX(&few));
}

#else  // one pass: the kernels for one kind of processor

namespace {
namespace PEFTKIT_NAME {

#include "peftkit_lanes.h"

constexpr int kBlock = PEFTKIT_PASS == 512 ? 4 : 2;  // rows and keys of a block, whose sums stay in registers

// to[i][k] = query[i] · key[k] for R rows and K keys.
template <class Format, int R, int K>
PEFTKIT_TARGET void score_block(const float* query, const Bits<Format>* key, int64_t step, int64_t width, float* to) {
  Lanes sum[R][K];
  for (int i = 0; i < R; ++i) {
    for (int k = 0; k < K; ++k) sum[i][k] = zero();
  }
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    Lanes own[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) own[i] = take_float(query + i * width + at);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const Lanes other = take<Format>(key + k * step + at);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) sum[i][k] = fma(own[i], other, sum[i][k]);
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int k = 0; k < K; ++k) {
      float whole = total(sum[i][k]);
      for (int64_t j = at; j < width; ++j) whole += query[i * width + j] * Format::load(key[k * step + j]);
      to[i * kKeys + k] = whole;
    }
  }
}

// out[i] += sum_k weight[i][k] value[k] for R rows and K keys.
template <class Format, int R, int K>
PEFTKIT_TARGET void value_block(const float* weight, const Bits<Format>* value, int64_t step, int64_t width,
                                float* out) {
  Lanes by[R][K];
  for (int i = 0; i < R; ++i) {
    for (int k = 0; k < K; ++k) by[i][k] = all(weight[i * kKeys + k]);
  }
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    Lanes own[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) own[i] = take_float(out + i * width + at);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const Lanes other = take<Format>(value + k * step + at);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) own[i] = fma(by[i][k], other, own[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) put(out + i * width + at, own[i]);
  }
  for (; at < width; ++at) {
    for (int i = 0; i < R; ++i) {
      for (int k = 0; k < K; ++k) out[i * width + at] += weight[i * kKeys + k] * Format::load(value[k * step + at]);
    }
  }
}

// Calls `use` with numbers of rows and keys that make up all of them, as template arguments, and where they begin.
template <class Use>
PEFTKIT_TARGET PEFTKIT_INLINE void blocks(int64_t rows, int64_t keys, Use&& use) {
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, kBlock> block;
  constexpr std::integral_constant<int, 4> four;
  int64_t k = 0;
  for (; k + four <= keys; k += four) {
    int64_t i = 0;
    for (; i + block <= rows; i += block) use(block, four, i, k);
    for (; i < rows; ++i) use(one, four, i, k);
  }
  for (; k < keys; ++k) {
    for (int64_t i = 0; i < rows; ++i) use(one, one, i, k);
  }
}

// The weights of some keys from their scores, relative to the highest score so far; what has been added up is rescaled.
PEFTKIT_TARGET void weigh(State& state, int64_t row, float* score, int64_t count) {
  float high = state.high[row];
  for (int64_t k = 0; k < count; ++k) high = std::max(high, score[k]);
  if (high > state.high[row]) {
    const float by = exponential(state.high[row] - high);
    state.total[row] *= by;
    float* out = state.out + row * state.width;
    for (int64_t j = 0; j < state.width; ++j) out[j] *= by;
    state.high[row] = high;
  }
  for (int64_t k = 0; k < count; ++k) score[k] = exponential(score[k] - high);
  float sum = 0.0f;
  for (int64_t k = 0; k < count; ++k) sum += score[k];
  state.total[row] += sum;
}

template <class Format>
PEFTKIT_TARGET void attend(State& state, const Keys<Format>& keys) {
  float weight[kFew * kKeys];
  const int64_t width = state.width;
  for (int64_t first = 0; first < keys.count; first += kKeys) {
    const int64_t count = std::min(kKeys, keys.count - first);
    const Bits<Format>* key = keys.key + first * keys.key_step;
    const Bits<Format>* value = keys.value + first * keys.value_step;
    blocks(state.rows, count, [&](auto rows, auto some, int64_t i, int64_t k) PEFTKIT_TARGET {
      score_block<Format, decltype(rows)::value, decltype(some)::value>(
          state.query + i * width, key + k * keys.key_step, keys.key_step, width, weight + i * kKeys + k);
    });
    for (int64_t i = 0; i < state.rows; ++i) {
      if (keys.bias != nullptr) {
        const Bits<Format>* bias = keys.bias + i * keys.bias_row + first * keys.bias_step;
        for (int64_t k = 0; k < count; ++k) weight[i * kKeys + k] += Format::load(bias[k * keys.bias_step]);
      }
      weigh(state, i, weight + i * kKeys, count);
    }
    blocks(state.rows, count, [&](auto rows, auto some, int64_t i, int64_t k) PEFTKIT_TARGET {
      value_block<Format, decltype(rows)::value, decltype(some)::value>(
          weight + i * kKeys + k, value + k * keys.value_step, keys.value_step, width, state.out + i * width);
    });
  }
}

}  // namespace PEFTKIT_NAME
}  // namespace

#endif
