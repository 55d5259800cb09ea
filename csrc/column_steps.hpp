// column_steps.hpp: keep some columns of packed rows, a vector of them at a time.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "kernels.hpp"
#include "vectors.hpp"

namespace bonsai_fast {
namespace {

#if defined(__AVX512VBMI2__)

constexpr int64_t kWindow = 64;
constexpr int64_t kMinBlockBytes = INT64_MAX;

// Moves the kept elements to the front.
template <int64_t kItem>
BONSAI_FAST_INLINE void take_step(const char* source, uint64_t keep, const uint8_t*, char* out) {
  const __m512i window = _mm512_loadu_si512(source);
  __m512i kept;
  if constexpr (kItem == 1) kept = _mm512_maskz_compress_epi8(keep, window);
  if constexpr (kItem == 2)
    kept = _mm512_maskz_compress_epi16(static_cast<__mmask32>(keep), window);
  if constexpr (kItem == 4)
    kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(keep), window);
  if constexpr (kItem == 8) kept = _mm512_maskz_compress_epi64(static_cast<__mmask8>(keep), window);
  _mm512_storeu_si512(out, kept);
}

#elif defined(__AVX2__)

constexpr int64_t kWindow = 16;
constexpr int64_t kMinBlockBytes = 32;

template <int64_t kItem>
BONSAI_FAST_INLINE void take_step(const char* source, uint64_t, const uint8_t* shuffle, char* out) {
  const __m128i window = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  const __m128i order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(shuffle));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(window, order));
}

#endif

#if defined(__AVX2__)

// Rows that use one reading of a step's description.
constexpr int64_t kRowsAtOnce = 4;

template <int64_t kItem, int64_t kCount>
BONSAI_FAST_INLINE void step_along(const StepRows& rows, int64_t first) {
  // Local copies: the compiler must assume that writes through a char* change the members.
  const int64_t row_stride = rows.row_stride, row_bytes = rows.row_bytes;
  const char* const source = rows.source + first * row_stride;
  const uint8_t* shuffle = rows.shuffles;
  char* out = rows.out + first * row_bytes;
  const Step* const end = rows.steps + rows.num_steps;
  for (const Step* step = rows.steps; step < end; ++step) {
    const char* const window = source + step->source;
    const uint64_t keep = step->keep;
    const int64_t bytes = step->bytes;
    for (int64_t row = 0; row < kCount; ++row)
      take_step<kItem>(window + row * row_stride, keep, shuffle, out + row * row_bytes);
    out += bytes;
    shuffle += kWindow;
  }
}

template <int64_t kItem>
void step_rows_of(const StepRows& rows) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows.count; row += kRowsAtOnce)
    step_along<kItem, kRowsAtOnce>(rows, row);
  for (; row < rows.count; ++row) step_along<kItem, 1>(rows, row);
}

void step_rows(int64_t item, const StepRows& rows) {
  switch (item) {
    case 1:
      return step_rows_of<1>(rows);
    case 2:
      return step_rows_of<2>(rows);
    case 4:
      return step_rows_of<4>(rows);
    default:
      return step_rows_of<8>(rows);
  }
}

constexpr auto kStepRows = step_rows;

#else

constexpr int64_t kWindow = 0;
constexpr int64_t kMinBlockBytes = 16;
constexpr void (*kStepRows)(int64_t, const StepRows&) = nullptr;

#endif

}  // namespace
}  // namespace bonsai_fast
