// moments.cpp: statistics over the rows or the columns of a matrix, equal for any number of threads
// and any instruction set.
#include "moments.hpp"

#include <pybind11/numpy.h>

#include <cstdint>
#include <string>

#include "arrays.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace py = pybind11;

namespace bonsai_fast::moments {
namespace {

// Threads split at multiples of this many columns or rows: they share no cache line.
constexpr int64_t kGrain = 64;

enum class Axis { kRows, kColumns };

py::tuple moments_of(Axis axis, const py::array& x, const std::string& dtype, int64_t num_threads,
                     const std::string& isa_name) {
  const Floating floating = floating_of(x, dtype, num_threads);
  const Kernels& kernels = isa::kernels_for(isa_name);
  const bool of_columns = axis == Axis::kColumns;
  const auto kernel = of_columns ? kernels.column_moments : kernels.row_moments;
  const int64_t count = of_columns ? floating.columns : floating.rows;
  py::array_t<double> sum_of_squares(count), sum_abs(count), sum(count);
  py::array_t<float> max_abs(count);
  const Moments out{sum_of_squares.mutable_data(), sum_abs.mutable_data(), sum.mutable_data(),
                    max_abs.mutable_data()};
  const int64_t threads = useful_threads(num_threads, x.nbytes());
  {
    // From here on no Python object may be touched.
    py::gil_scoped_release no_gil;
    parallel_for(count, threads, kGrain,
                 [&](int64_t begin, int64_t end) { kernel(floating, begin, end, out); });
  }
  return py::make_tuple(sum_of_squares, sum_abs, sum, max_abs);
}

}  // namespace

void register_api(py::module_& m) {
  const auto define = [&m](const char* name, Axis axis, const char* doc) {
    m.def(
        name,
        [axis](const py::array& x, const std::string& dtype, int64_t num_threads,
               const std::string& isa) { return moments_of(axis, x, dtype, num_threads, isa); },
        py::arg("x"), py::kw_only(), py::arg("dtype") = "float32", py::arg("num_threads") = 1,
        py::arg("isa") = "best", doc);
  };
  define("column_moments", Axis::kColumns,
         "(sum of squares, sum of magnitudes, sum, largest magnitude) of every column of x.");
  define("row_moments", Axis::kRows,
         "(sum of squares, sum of magnitudes, sum, largest magnitude) of every row of x.");
}

}  // namespace bonsai_fast::moments
