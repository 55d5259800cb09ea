// slicing.cpp: copy the kept rows or columns of a matrix into a dense array; runs are copied whole.
#include "slicing.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "arrays.hpp"
#include "check.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace py = pybind11;

namespace bonsai_fast::slicing {
namespace {

// Sizes in elements, strides in bytes. A 1-D array is a matrix of one column.
struct Matrix {
  const char* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
};

// Kept columns first, first + 1, ..., first + length - 1.
struct Run {
  int64_t first, length;
};

enum class Axis { kRows, kColumns };

template <int64_t kItem>
void copy_strided(const char* source, int64_t stride, int64_t count, char* out) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * kItem, source + i * stride, kItem);
}

// out[i, :] = source[index[i], :] for i in [begin, end); `out` points at row 0.
template <int64_t kItem>
void take_rows(const Matrix& source, const int64_t* index, int64_t begin, int64_t end, char* out) {
  const int64_t row_bytes = source.columns * kItem;
  const bool packed_rows = source.column_stride == kItem || source.columns == 1;
  const bool dense = packed_rows && source.row_stride == row_bytes;
  for (int64_t i = begin; i < end;) {
    int64_t run = 1;
    while (dense && i + run < end && index[i + run] == index[i] + run) ++run;
    const char* first = source.data + index[i] * source.row_stride;
    if (packed_rows) {
      std::memcpy(out + i * row_bytes, first, run * row_bytes);
    } else {
      copy_strided<kItem>(first, source.column_stride, source.columns, out + i * row_bytes);
    }
    i += run;
  }
}

// out[r, :] = the columns of `runs` of source[r, :] for r in [begin, end); `out` points at row 0.
template <int64_t kItem>
void take_blocks(const Matrix& source, const std::vector<Run>& runs, int64_t count, int64_t begin,
                 int64_t end, char* out) {
  out += begin * count * kItem;
  for (int64_t row = begin; row < end; ++row) {
    const char* first = source.data + row * source.row_stride;
    for (const Run& run : runs) {
      std::memcpy(out, first + run.first * kItem, run.length * kItem);
      out += run.length * kItem;
    }
  }
}

// The same, column by column: any column stride, and faster where runs are short.
template <int64_t kItem>
void take_elements(const Matrix& source, const int64_t* index, int64_t count, int64_t begin,
                   int64_t end, char* out) {
  for (int64_t row = begin; row < end; ++row) {
    const char* first = source.data + row * source.row_stride;
    char* line = out + row * count * kItem;
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(line + j * kItem, first + index[j] * source.column_stride, kItem);
  }
}

// The kept columns of a row as steps for a kernel; the last few columns do not fit a window.
struct Steps {
  std::vector<Step> steps;
  std::vector<uint8_t> shuffles;
  int64_t taken = 0;  // columns that the steps take
};

// A step reads and writes a whole window, which must fit into the row of source and of output.
Steps steps_of(const int64_t* index, int64_t count, int64_t columns, int64_t item, int64_t window) {
  Steps plan;
  const int64_t per_window = window / item, row_bytes = count * item;
  while (plan.taken < count) {
    const int64_t first = index[plan.taken] / per_window * per_window;
    if ((first + per_window) > columns || plan.taken * item + window > row_bytes) break;
    Step step{0, first * item, 0};
    std::vector<uint8_t> shuffle(static_cast<size_t>(window), 0x80);
    for (; plan.taken < count && index[plan.taken] < first + per_window; ++plan.taken) {
      const int64_t at = index[plan.taken] - first;
      step.keep |= uint64_t{1} << at;
      for (int64_t byte = 0; byte < item; ++byte)
        shuffle[static_cast<size_t>(step.bytes + byte)] = static_cast<uint8_t>(at * item + byte);
      step.bytes += item;
    }
    plan.steps.push_back(step);
    plan.shuffles.insert(plan.shuffles.end(), shuffle.begin(), shuffle.end());
  }
  return plan;
}

// out[r, :] = source[r, index] by a kernel's steps, for r in [begin, end); `out` points at row 0.
template <int64_t kItem>
void take_steps(const Kernels& kernels, const Matrix& source, const Steps& plan,
                const int64_t* index, int64_t count, int64_t begin, int64_t end, char* out) {
  const StepRows rows{source.data + begin * source.row_stride,
                      source.row_stride,
                      end - begin,
                      plan.steps.data(),
                      plan.shuffles.data(),
                      static_cast<int64_t>(plan.steps.size()),
                      out + begin * count * kItem,
                      count * kItem};
  kernels.step_rows(kItem, rows);
  for (int64_t row = begin; row < end; ++row) {
    const char* first = source.data + row * source.row_stride;
    char* line = out + row * count * kItem;
    for (int64_t j = plan.taken; j < count; ++j)
      std::memcpy(line + j * kItem, first + index[j] * kItem, kItem);
  }
}

std::vector<Run> runs_of(const int64_t* index, int64_t count) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < count; ++i) {
    if (!runs.empty() && runs.back().first + runs.back().length == index[i]) {
      ++runs.back().length;
    } else {
      runs.push_back({index[i], 1});
    }
  }
  return runs;
}

template <int64_t kItem>
void take_items(Axis axis, const Kernels& kernels, const Matrix& source, const int64_t* index,
                int64_t count, int64_t num_threads, char* out) {
  if (axis == Axis::kRows) {
    const int64_t threads = useful_threads(num_threads, count * source.columns * kItem);
    parallel_for(count, threads, 1, [&](int64_t begin, int64_t end) {
      take_rows<kItem>(source, index, begin, end, out);
    });
  } else {
    const std::vector<Run> runs = runs_of(index, count);
    const int64_t num_runs = static_cast<int64_t>(runs.size());
    const bool packed_rows = source.column_stride == kItem;
    const bool in_blocks = packed_rows && count * kItem / num_runs >= kernels.min_block_bytes;
    const bool in_steps = packed_rows && !in_blocks && kernels.window > 0;
    const Steps plan =
        in_steps ? steps_of(index, count, source.columns, kItem, kernels.window) : Steps{};
    const int64_t threads = useful_threads(num_threads, source.rows * count * kItem);
    parallel_for(source.rows, threads, 1, [&](int64_t begin, int64_t end) {
      if (in_blocks) {
        take_blocks<kItem>(source, runs, count, begin, end, out);
      } else if (in_steps) {
        take_steps<kItem>(kernels, source, plan, index, count, begin, end, out);
      } else {
        take_elements<kItem>(source, index, count, begin, end, out);
      }
    });
  }
}

void check_index(const int64_t* index, int64_t count, int64_t size, const char* what) {
  for (int64_t i = 0; i < count; ++i) {
    CHECK_INDEX(0 <= index[i] && index[i] < size, "index[", i, "] is ", index[i],
                ", but source has ", size, " ", what);
    CHECK(i == 0 || index[i - 1] < index[i], "index must be strictly increasing, but index[", i - 1,
          "] is ", index[i - 1], " and index[", i, "] is ", index[i]);
  }
}

// Whether the byte ranges of two arrays, from first to last element, overlap.
bool may_overlap(const py::array& a, const py::array& b) {
  if (a.size() == 0 || b.size() == 0) return false;
  struct Extent {
    intptr_t low, high;
  };
  const auto extent_of = [](const py::array& array) {
    Extent extent{reinterpret_cast<intptr_t>(array.data()), 0};
    extent.high = extent.low + array.itemsize();
    for (py::ssize_t d = 0; d < array.ndim(); ++d) {
      const intptr_t reach = (array.shape(d) - 1) * array.strides(d);
      (reach < 0 ? extent.low : extent.high) += reach;
    }
    return extent;
  };
  const Extent x = extent_of(a), y = extent_of(b);
  return x.low < y.high && y.low < x.high;
}

void check_out(const py::array& out, const py::array& source, const py::array& index,
               const std::vector<py::ssize_t>& shape) {
  CHECK_TYPE(out.dtype().equal(source.dtype()), "out must have source's dtype ", dtype_of(source),
             ", got ", dtype_of(out));
  const bool same_shape = out.ndim() == static_cast<py::ssize_t>(shape.size()) &&
                          std::equal(shape.begin(), shape.end(), out.shape());
  CHECK(same_shape, "out must have shape ", std::string(py::str(py::cast(shape))), ", got ",
        shape_of(out));
  CHECK((out.flags() & py::array::c_style) != 0, "out must be C-contiguous");
  CHECK(out.writeable(), "out must be writeable");
  CHECK(!may_overlap(out, source), "out must not share memory with source");
  CHECK(!may_overlap(out, index), "out must not share memory with index");
}

py::array take(Axis axis, const py::array& source, const py::array& index,
               const std::optional<py::array>& out, int64_t num_threads,
               const std::string& isa_name) {
  const Kernels& kernels = isa::kernels_for(isa_name);
  const bool is_rows = axis == Axis::kRows;
  const char kind = source.dtype().kind();
  const int64_t item = source.itemsize();
  CHECK_TYPE((kind == 'b' || kind == 'i' || kind == 'u' || kind == 'f') && item <= 8,
             "source must hold booleans, integers or floats of 1, 2, 4 or 8 bytes, got ",
             dtype_of(source));
  CHECK(source.ndim() == 2 || (is_rows && source.ndim() == 1), "source must be ",
        is_rows ? "1-D or 2-D" : "2-D", ", got shape ", shape_of(source));
  CHECK_TYPE(py::isinstance<py::array_t<int64_t>>(index), "index must be int64, got ",
             dtype_of(index));
  CHECK(index.ndim() == 1, "index must be 1-D, got shape ", shape_of(index));
  CHECK(num_threads >= 1, "num_threads must be at least 1, got ", num_threads);

  const bool flat = source.ndim() == 1;
  const Matrix matrix{static_cast<const char*>(source.data()), source.shape(0),
                      flat ? 1 : source.shape(1), source.strides(0),
                      flat ? item : source.strides(1)};
  const auto packed_index = py::array_t<int64_t, py::array::c_style>::ensure(index);
  const int64_t count = packed_index.size();
  check_index(packed_index.data(), count, is_rows ? matrix.rows : matrix.columns,
              is_rows ? "rows" : "columns");

  std::vector<py::ssize_t> shape(source.shape(), source.shape() + source.ndim());
  shape[is_rows ? 0 : 1] = count;
  if (out) check_out(*out, source, index, shape);
  py::array result = out ? *out : py::array(source.dtype(), shape);
  if (result.size() == 0) return result;

  char* destination = static_cast<char*>(result.mutable_data());
  const int64_t* kept = packed_index.data();
  py::gil_scoped_release no_gil;
  switch (item) {
    case 1:
      take_items<1>(axis, kernels, matrix, kept, count, num_threads, destination);
      break;
    case 2:
      take_items<2>(axis, kernels, matrix, kept, count, num_threads, destination);
      break;
    case 4:
      take_items<4>(axis, kernels, matrix, kept, count, num_threads, destination);
      break;
    default:
      take_items<8>(axis, kernels, matrix, kept, count, num_threads, destination);
  }
  return result;
}

}  // namespace

void register_api(py::module_& m) {
  const auto define = [&m](const char* name, Axis axis, const char* doc) {
    m.def(
        name,
        [axis](const py::array& source, const py::array& index, const std::optional<py::array>& out,
               int64_t num_threads,
               const std::string& isa) { return take(axis, source, index, out, num_threads, isa); },
        py::arg("source"), py::arg("index"), py::kw_only(), py::arg("out") = py::none(),
        py::arg("num_threads") = 1, py::arg("isa") = "best", doc);
  };
  define("take_rows", Axis::kRows,
         "source[index] of a 1-D or 2-D array; index strictly increasing.");
  define("take_columns", Axis::kColumns,
         "source[:, index] of a 2-D array; index strictly increasing.");
}

}  // namespace bonsai_fast::slicing
