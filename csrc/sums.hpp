// sums.hpp: sums, sums of squares and of magnitudes, and the largest magnitude, down the columns of
// a matrix or along its rows.
//
// Sums run in float32 over at most 64 terms, eight at a time, and are combined in float64: an
// error of at most 16 roundings, 1e-6. Lanes are columns, or fixed positions in a row, and are
// never regrouped: every instruction set and every number of threads gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "vectors.hpp"

namespace bonsai_fast {
namespace {

// A patch is summed in registers: kPatchRows rows of kPatchColumns columns.
constexpr int64_t kPatchRows = 8;
constexpr int64_t kPatchColumns = 2 * kLanes;
constexpr int64_t kBlockRows = 8 * kPatchRows;
// A row is summed as if it were rows of this many columns, on every instruction set.
constexpr int64_t kStripes = 32;
// Columns read before the next rows: enough for the processor to fetch ahead.
constexpr int64_t kTile = 4096;
constexpr int32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000;

// Sums of patches in float32, per column. `largest` holds the bits of magnitudes: as integers they
// have the order of the magnitudes, with NaN as the largest.
template <int64_t kColumns>
struct Partial {
  float squares[kColumns], magnitudes[kColumns], values[kColumns];
  int32_t largest[kColumns];
};

// Whether float32 can square and sum such magnitudes: nothing overflows, and squares that underflow
// are negligible beside the largest.
inline bool is_tame(int32_t largest) {
  constexpr int32_t kSmall = (127 - 40) << 23, kLarge = (127 + 55) << 23;
  return largest == 0 || (largest >= kSmall && largest <= kLarge);
}

// Adds a patch of up to kPatchRows rows to the sums of its columns.
template <typename T, int64_t kColumns>
BONSAI_FAST_INLINE void add_patch(const T* data, int64_t row_stride, int64_t rows,
                                  Partial<kColumns>& sums, int64_t at) {
  Floats squares[2] = {}, magnitudes[2] = {}, values[2] = {};
  Ints largest[2] = {};
  for (int64_t row = 0; row < rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      Floats x, magnitude;
      Ints bits;
      load(data + row * row_stride + half * kLanes, x);
      copy_bits(x, bits);
      bits &= 0x7fffffff;
      copy_bits(bits, magnitude);
      if constexpr (sizeof(T) == sizeof(float)) {
        add_square(x, squares[half]);
      } else {
        add_exact_square(x, squares[half]);
      }
      magnitudes[half] += magnitude;
      values[half] += x;
      raise_to(bits, largest[half]);
    }
  }
  for (int half = 0; half < 2; ++half) {
    add_to(sums.squares + at + half * kLanes, squares[half]);
    add_to(sums.magnitudes + at + half * kLanes, magnitudes[half]);
    add_to(sums.values + at + half * kLanes, values[half]);
    raise_to(sums.largest + at + half * kLanes, largest[half]);
  }
}

// bfloat16 is the upper half of float32: even columns come first here, then odd ones, since two
// neighbours are widened by a shift and a mask.
template <int64_t kColumns>
BONSAI_FAST_INLINE void add_patch(const BFloat16* data, int64_t row_stride, int64_t rows,
                                  Partial<kColumns>& sums, int64_t at) {
  constexpr int32_t kUpper = -65536;
  Floats squares[2] = {}, magnitudes[2] = {}, values[2] = {};
  Shorts largest = {};
  for (int64_t row = 0; row < rows; ++row) {
    Shorts bits, sizes;
    Ints pair, size_pair;
    std::memcpy(&bits, data + row * row_stride, sizeof bits);
    sizes = bits & static_cast<int16_t>(0x7fff);
    raise_to(sizes, largest);
    copy_bits(bits, pair);
    copy_bits(sizes, size_pair);
    const Ints wide[2] = {pair << 16, pair & kUpper};
    const Ints wide_sizes[2] = {size_pair << 16, size_pair & kUpper};
    for (int half = 0; half < 2; ++half) {
      Floats x, magnitude;
      copy_bits(wide[half], x);
      copy_bits(wide_sizes[half], magnitude);
      add_exact_square(x, squares[half]);
      magnitudes[half] += magnitude;
      values[half] += x;
    }
  }
  Ints pair;
  copy_bits(largest, pair);
  const Ints wide[2] = {pair << 16, pair & kUpper};
  for (int half = 0; half < 2; ++half) {
    add_to(sums.squares + at + half * kLanes, squares[half]);
    add_to(sums.magnitudes + at + half * kLanes, magnitudes[half]);
    add_to(sums.values + at + half * kLanes, values[half]);
    raise_to(sums.largest + at + half * kLanes, wide[half]);
  }
}

// Adds fewer columns than a patch has: the rest is zero.
template <typename T, int64_t kColumns>
void add_narrow_patch(const T* data, int64_t row_stride, int64_t rows, int64_t columns,
                      Partial<kColumns>& sums, int64_t at) {
  T padded[kPatchRows * kPatchColumns] = {};
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(padded + row * kPatchColumns, data + row * row_stride,
                static_cast<size_t>(columns) * sizeof(T));
  add_patch(padded, kPatchColumns, rows, sums, at);
}

// The same sums in float64 throughout, for values that float32 cannot square.
template <typename T>
void add_exactly(const T* data, int64_t row_stride, int64_t rows, double& squares,
                 double& magnitudes, double& values) {
  for (int64_t row = 0; row < rows; ++row) {
    const double x = static_cast<float>(data[row * row_stride]);
    squares += x * x;
    magnitudes += x < 0 ? -x : x;
    values += x;
  }
}

// The position at which column c of a patch is stored.
template <typename T>
BONSAI_FAST_INLINE int64_t place_of(int64_t c) {
  return c;
}
template <>
BONSAI_FAST_INLINE int64_t place_of<BFloat16>(int64_t c) {
  return c / 2 + c % 2 * kLanes;
}

// Adds one block's sums of up to kPatchColumns columns to the totals.
template <typename T>
void merge_patch(const T* data, int64_t row_stride, int64_t rows, int64_t columns,
                 const Partial<kTile>& sums, int64_t at, const Moments& out) {
  float squares[kPatchColumns], magnitudes[kPatchColumns], values[kPatchColumns];
  int32_t largest[kPatchColumns], all_largest[kPatchColumns] = {};
  bool tame = true;
  for (int64_t c = 0; c < kPatchColumns; ++c) {
    const int64_t place = at + place_of<T>(c);
    squares[c] = sums.squares[place];
    magnitudes[c] = sums.magnitudes[place];
    values[c] = sums.values[place];
    largest[c] = sums.largest[place];
    tame &= is_tame(largest[c]);
  }
  std::memcpy(all_largest, out.max_abs, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t c = 0; c < kPatchColumns; ++c)
    all_largest[c] = largest[c] > all_largest[c] ? largest[c] : all_largest[c];
  std::memcpy(out.max_abs, all_largest, static_cast<size_t>(columns) * sizeof(float));
  if (!tame) {
    for (int64_t c = 0; c < columns; ++c)
      add_exactly(data + c, row_stride, rows, out.sum_of_squares[c], out.sum_abs[c], out.sum[c]);
    return;
  }
  for (int64_t c = 0; c < columns; ++c) out.sum_of_squares[c] += static_cast<double>(squares[c]);
  for (int64_t c = 0; c < columns; ++c) out.sum_abs[c] += static_cast<double>(magnitudes[c]);
  for (int64_t c = 0; c < columns; ++c) out.sum[c] += static_cast<double>(values[c]);
}

inline int64_t at_most(int64_t limit, int64_t value) { return value < limit ? value : limit; }

inline Moments from(const Moments& moments, int64_t at) {
  return {moments.sum_of_squares + at, moments.sum_abs + at, moments.sum + at,
          moments.max_abs + at};
}

inline void clear(const Moments& out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    out.sum_of_squares[i] = out.sum_abs[i] = out.sum[i] = 0;
    out.max_abs[i] = 0;
  }
}

// Clears the first columns, as many as fit.
inline void clear(Partial<kTile>& sums, int64_t columns) {
  const size_t bytes = static_cast<size_t>(at_most(kTile, columns)) * sizeof(float);
  std::memset(sums.squares, 0, bytes);
  std::memset(sums.magnitudes, 0, bytes);
  std::memset(sums.values, 0, bytes);
  std::memset(sums.largest, 0, bytes);
}

// The bits of a NaN depend on how it was widened: write the same NaN everywhere.
inline void unify_nans(const Moments& out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    int32_t bits;
    std::memcpy(&bits, out.max_abs + i, sizeof bits);
    bits = bits > kInfinity ? kNaN : bits;
    std::memcpy(out.max_abs + i, &bits, sizeof bits);
  }
}

template <typename T>
void column_moments_of(const Floating& x, int64_t begin, int64_t end, const Moments& out) {
  clear(out, begin, end);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t width = at_most(kTile, end - first);
    for (int64_t top = 0; top < x.rows; top += kBlockRows) {
      const int64_t rows = at_most(kBlockRows, x.rows - top);
      const T* const block = static_cast<const T*>(x.data) + top * x.row_stride + first;
      Partial<kTile> sums;
      clear(sums, width + kPatchColumns - 1);
      for (int64_t row = 0; row < rows; row += kPatchRows) {
        const T* const line = block + row * x.row_stride;
        const int64_t patch_rows = at_most(kPatchRows, rows - row);
        int64_t c = 0;
        for (; c + kPatchColumns <= width; c += kPatchColumns)
          add_patch(line + c, x.row_stride, patch_rows, sums, c);
        if (c < width) add_narrow_patch(line + c, x.row_stride, patch_rows, width - c, sums, c);
      }
      for (int64_t c = 0; c < width; c += kPatchColumns)
        merge_patch(block + c, x.row_stride, rows, at_most(kPatchColumns, width - c), sums, c,
                    from(out, first + c));
    }
  }
  unify_nans(out, begin, end);
}

// Adds up to kBlockRows * kStripes elements of one row to its totals.
template <typename T>
void add_stretch(const T* data, int64_t width, const Moments& out) {
  Partial<kStripes> sums = {};
  const int64_t whole = width / kStripes, rest = width % kStripes;
  for (int64_t line = 0; line < whole; line += kPatchRows) {
    for (int64_t c = 0; c < kStripes; c += kPatchColumns)
      add_patch(data + line * kStripes + c, kStripes, at_most(kPatchRows, whole - line), sums, c);
  }
  for (int64_t c = 0; c < rest; c += kPatchColumns)
    add_narrow_patch(data + whole * kStripes + c, kStripes, 1, at_most(kPatchColumns, rest - c),
                     sums, c);
  int32_t largest = 0, before;
  for (const int32_t bits : sums.largest) largest = bits > largest ? bits : largest;
  std::memcpy(&before, out.max_abs, sizeof before);
  before = largest > before ? largest : before;
  std::memcpy(out.max_abs, &before, sizeof before);
  if (!is_tame(largest))
    return add_exactly(data, 1, width, *out.sum_of_squares, *out.sum_abs, *out.sum);
  for (int64_t c = 0; c < kStripes; ++c) {
    const int64_t place = c / kPatchColumns * kPatchColumns + place_of<T>(c % kPatchColumns);
    *out.sum_of_squares += static_cast<double>(sums.squares[place]);
    *out.sum_abs += static_cast<double>(sums.magnitudes[place]);
    *out.sum += static_cast<double>(sums.values[place]);
  }
}

// A stretch of a row is a block whose rows are kStripes long and follow one another.
template <typename T>
void row_moments_of(const Floating& x, int64_t begin, int64_t end, const Moments& out) {
  constexpr int64_t kStretch = kBlockRows * kStripes;
  clear(out, begin, end);
  for (int64_t row = begin; row < end; ++row) {
    const T* const line = static_cast<const T*>(x.data) + row * x.row_stride;
    for (int64_t first = 0; first < x.columns; first += kStretch) {
      add_stretch(line + first, at_most(kStretch, x.columns - first), from(out, row));
    }
  }
  unify_nans(out, begin, end);
}

}  // namespace
}  // namespace bonsai_fast
