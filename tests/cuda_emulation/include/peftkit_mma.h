// In place of the tensor cores' product: what lanes hold is put together as the PTX manual says, and multiplied.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace peftkit {

template <class T>
float part_of(uint32_t word, unsigned which) {
  T value;
  const auto bits = static_cast<uint16_t>(word >> (16 * which));
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value.own);
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  cuda_emulation::Where where = cuda_emulation::Where::current()) {
  struct Held {
    uint32_t a[4], b[2];
  } own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const std::byte* all = cuda_emulation::meet(0xffffffffu, &own, sizeof own, "multiply_add", where);
  const auto held = [&](unsigned lane) {
    Held found;
    std::memcpy(&found, all + cuda_emulation::kBrought * lane, sizeof found);
    return found;
  };
  const unsigned lane = cuda_emulation::number() % 32, row = lane / 4, column = lane % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned depth = 0; depth < 16; ++depth) {
      // Of a pair of depths 2q and 2q + 1 lane q holds both; depths from 8 on are its later words.
      const unsigned q = depth % 8 / 2, late = depth / 8;
      const Held left = held(row * 4 + q), right = held((column + i % 2) * 4 + q);
      sums[i] += part_of<T>(left.a[2 * late + i / 2], depth % 2) * part_of<T>(right.b[late], depth % 2);
    }
  }
}

}  // namespace peftkit
