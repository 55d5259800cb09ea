// kernels.hpp: inner loops that are compiled once for every instruction set.
//
// Include nothing else here. The linker keeps one copy of an inline function, and the copy compiled
// for AVX-512 would crash on other processors.
#pragma once

#include <cstdint>

namespace bonsai_fast {

enum class Element { kFloat32, kFloat16, kBFloat16 };

// A matrix of floats; the elements of a row are neighbours.
struct Floating {
  Element element;
  const void* data;
  int64_t rows, columns;
  int64_t row_stride;  // in elements
};

struct Moments {
  double* sum_of_squares;
  double* sum_abs;
  double* sum;
  float* max_abs;
};

// One step of a column slice reads a window of a row and writes the kept elements.
struct Step {
  uint64_t keep;   // bit i: element i is kept
  int64_t source;  // where the window begins, in bytes
  int64_t bytes;   // how many are kept
};

// `count` rows from `source` to `out`, which has `row_bytes` per row; strides in bytes. Every step
// writes a whole window, inside the row, from where the last one stopped.
struct StepRows {
  const char* source;
  int64_t row_stride, count;
  const Step* steps;
  const uint8_t* shuffles;  // for every step and byte of its window: which one comes there
  int64_t num_steps;
  char* out;
  int64_t row_bytes;
};

struct Kernels {
  const char* name;
  // Moments of the columns, over the rows, and of the rows, over the columns, from `begin` to
  // `end`. The same bits on every instruction set, except in a NaN.
  void (*column_moments)(const Floating&, int64_t begin, int64_t end, const Moments&);
  void (*row_moments)(const Floating&, int64_t begin, int64_t end, const Moments&);
  // Bytes that a step reads and writes; 0 if there is no such kernel.
  int64_t window;
  void (*step_rows)(int64_t item, const StepRows&);
  // If kept runs are longer than this on average, copying run by run is faster.
  int64_t min_block_bytes;
};

}  // namespace bonsai_fast
