// moments.cpp: statistics over the rows of a matrix, column by column, equal for any number of
// threads.
#include "moments.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "check.hpp"
#include "half.hpp"
#include "parallel.hpp"

namespace py = pybind11;

namespace bonsai_fast::moments {
namespace {

// Columns summed together: their partial sums stay in the first-level cache.
constexpr int64_t kTile = 512;
// Threads meet at multiples of this many columns, so that they share no cache line.
constexpr int64_t kGrain = 64;

// Sizes and stride in elements; a row's elements are neighbours.
template <typename Element>
struct Matrix {
  const Element* data;
  int64_t rows, columns, row_stride;
};

struct Moments {
  double* sum_of_squares;
  double* sum_abs;
  double* sum;
  float* max_abs;
};

// Each column is summed in row order in float64, so no split over columns can change a bit.
template <typename Element>
void channel_moments(const Matrix<Element>& x, int64_t begin, int64_t end, const Moments& out) {
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t width = std::min(kTile, end - first);
    double squares[kTile] = {}, magnitudes[kTile] = {}, values[kTile] = {};
    float largest[kTile] = {};
    for (int64_t row = 0; row < x.rows; ++row) {
      const Element* const line = x.data + row * x.row_stride + first;
      for (int64_t c = 0; c < width; ++c) {
        const float value = static_cast<float>(line[c]);
        const float magnitude = std::fabs(value);
        const double wide = value;
        squares[c] += wide * wide;
        magnitudes[c] += magnitude;
        values[c] += wide;
        // A NaN replaces any number, and nothing replaces a NaN.
        const bool replaces = (magnitude > largest[c]) | (magnitude != magnitude);
        largest[c] = replaces ? magnitude : largest[c];
      }
    }
    std::copy_n(squares, width, out.sum_of_squares + first);
    std::copy_n(magnitudes, width, out.sum_abs + first);
    std::copy_n(values, width, out.sum + first);
    std::copy_n(largest, width, out.max_abs + first);
  }
}

template <typename Element>
void column_mean_abs(const Matrix<Element>& weight, int64_t begin, int64_t end, double* out) {
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t width = std::min(kTile, end - first);
    double magnitudes[kTile] = {};
    for (int64_t row = 0; row < weight.rows; ++row) {
      const Element* const line = weight.data + row * weight.row_stride + first;
      for (int64_t c = 0; c < width; ++c) magnitudes[c] += std::fabs(static_cast<float>(line[c]));
    }
    const double rows = static_cast<double>(weight.rows);
    for (int64_t c = 0; c < width; ++c) out[first + c] = magnitudes[c] / rows;
  }
}

void check_matrix(const py::array& array, const char* name, int64_t num_threads) {
  const auto shape = [&] { return std::string(py::str(array.attr("shape"))); };
  CHECK(array.ndim() == 2, name, " must be 2-D, got shape ", shape());
  const bool readable = (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0 &&
                        (array.shape(1) <= 1 || array.strides(1) == array.itemsize()) &&
                        array.strides(0) % array.itemsize() == 0;
  CHECK(array.size() == 0 || readable, name,
        " must be aligned, with the elements of a row next to each other; got shape ", shape(),
        " and strides ", std::string(py::str(array.attr("strides"))));
  CHECK(num_threads >= 1, "num_threads must be at least 1, got ", num_threads);
}

// Calls body(matrix, begin, end) on ranges of columns, `array` read as floats of type `dtype`.
template <typename Body>
void over_columns(const py::array& array, const char* name, const std::string& dtype,
                  int64_t num_threads, const Body& body) {
  const auto run = [&](auto element, const py::dtype& storage) {
    using Element = decltype(element);
    CHECK_TYPE(array.dtype().equal(storage), name, " of dtype=\"", dtype, "\" must be stored as ",
               std::string(py::str(storage)), ", got ", std::string(py::str(array.dtype())));
    const int64_t stride = array.strides(0) / array.itemsize();
    const Matrix<Element> matrix{static_cast<const Element*>(array.data()), array.shape(0),
                                 array.shape(1), stride};
    const int64_t threads = useful_threads(num_threads, array.nbytes());
    // From here on no Python object may be touched.
    py::gil_scoped_release no_gil;
    parallel_for(matrix.columns, threads, kGrain,
                 [&](int64_t begin, int64_t end) { body(matrix, begin, end); });
  };
  if (dtype == "float32") {
    run(float{}, py::dtype::of<float>());
  } else if (dtype == "float16") {
    run(Float16{}, py::dtype::of<uint16_t>());
  } else {
    CHECK(dtype == "bfloat16", "dtype must be \"float32\", \"float16\" or \"bfloat16\", got \"",
          dtype, "\"");
    run(BFloat16{}, py::dtype::of<uint16_t>());
  }
}

py::tuple channel_moments_of(const py::array& x, const std::string& dtype, int64_t num_threads) {
  check_matrix(x, "x", num_threads);
  py::array_t<double> sum_of_squares(x.shape(1)), sum_abs(x.shape(1)), sum(x.shape(1));
  py::array_t<float> max_abs(x.shape(1));
  const Moments out{sum_of_squares.mutable_data(), sum_abs.mutable_data(), sum.mutable_data(),
                    max_abs.mutable_data()};
  over_columns(x, "x", dtype, num_threads, [&](const auto& matrix, int64_t begin, int64_t end) {
    channel_moments(matrix, begin, end, out);
  });
  return py::make_tuple(sum_of_squares, sum_abs, sum, max_abs);
}

py::array_t<double> column_mean_abs_of(const py::array& weight, const std::string& dtype,
                                       int64_t num_threads) {
  check_matrix(weight, "weight", num_threads);
  CHECK(weight.shape(0) > 0, "weight must have at least one row");
  py::array_t<double> mean(weight.shape(1));
  double* const out = mean.mutable_data();
  over_columns(weight, "weight", dtype, num_threads,
               [out](const auto& matrix, int64_t begin, int64_t end) {
                 column_mean_abs(matrix, begin, end, out);
               });
  return mean;
}

}  // namespace

void register_api(py::module_& m) {
  m.def("channel_moments", &channel_moments_of, py::arg("x"), py::kw_only(),
        py::arg("dtype") = "float32", py::arg("num_threads") = 1,
        "(sum of squares, sum of magnitudes, sum, largest magnitude) over the rows of x.");
  m.def("column_mean_abs", &column_mean_abs_of, py::arg("weight"), py::kw_only(),
        py::arg("dtype") = "float32", py::arg("num_threads") = 1,
        "Mean magnitude over the rows of weight.");
}

}  // namespace bonsai_fast::moments
