// wanda.cpp: the Wanda score of each weight, and the N best of every M neighbours in a row.
#include "wanda.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "check.hpp"
#include "half.hpp"
#include "parallel.hpp"

namespace py = pybind11;

namespace bonsai_fast::wanda {
namespace {

// Groups up to this size are ranked by comparing all pairs, larger ones by selection.
constexpr int64_t kPairwise = 16;

// scores[c] = |row[c]| * scale[c] for `count` neighbours.
template <typename T>
void score(const T* row, const float* scale, int64_t count, float* scores) {
  for (int64_t c = 0; c < count; ++c) scores[c] = std::fabs(static_cast<float>(row[c])) * scale[c];
}

// Marks the n largest of m scores, and the first ones of equal scores.
void keep_by_pairs(const float* scores, int64_t n, int64_t m, bool* keep) {
  for (int64_t i = 0; i < m; ++i) {
    int64_t before = 0;
    for (int64_t j = 0; j < i; ++j) before += scores[j] >= scores[i];
    for (int64_t j = i + 1; j < m; ++j) before += scores[j] > scores[i];
    keep[i] = before < n;
  }
}

void keep_by_selection(const float* scores, int64_t n, int64_t m, std::vector<int64_t>& order,
                       bool* keep) {
  order.resize(static_cast<size_t>(m));
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto stronger = [scores](int64_t a, int64_t b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  };
  if (n < m) std::nth_element(order.begin(), order.begin() + n, order.end(), stronger);
  std::fill_n(keep, m, false);
  for (int64_t i = 0; i < n; ++i) keep[order[static_cast<size_t>(i)]] = true;
}

// Returns whether every score is a number.
template <typename T>
bool keep_rows(const Floating& weight, const float* scale, int64_t n, int64_t m, int64_t begin,
               int64_t end, bool* keep) {
  std::vector<float> scores(static_cast<size_t>(weight.columns));
  std::vector<int64_t> order;
  for (int64_t row = begin; row < end; ++row) {
    score(static_cast<const T*>(weight.data) + row * weight.row_stride, scale, weight.columns,
          scores.data());
    // Selection needs an order, and NaN has none.
    bool is_ordered = true;
    for (const float value : scores) is_ordered &= value == value;
    if (!is_ordered) return false;
    for (int64_t first = 0; first < weight.columns; first += m) {
      bool* const group = keep + row * weight.columns + first;
      if (m == 4) {
        keep_by_pairs(scores.data() + first, n, 4, group);  // a size known here unrolls
      } else if (m <= kPairwise) {
        keep_by_pairs(scores.data() + first, n, m, group);
      } else {
        keep_by_selection(scores.data() + first, n, m, order, group);
      }
    }
  }
  return true;
}

using Scale = py::array_t<float, py::array::c_style>;

void check_scale(const Floating& weight, const py::array& scale) {
  CHECK_TYPE(py::isinstance<py::array_t<float>>(scale), "scale must be float32, got ",
             dtype_of(scale));
  CHECK(scale.ndim() == 1 && scale.shape(0) == weight.columns, "scale must have shape (",
        weight.columns, ",), got ", shape_of(scale));
}

py::array_t<float> scores_of(const py::array& x, const py::array& given_scale,
                             const std::string& dtype, int64_t num_threads) {
  const Floating weight = floating_of(x, dtype, num_threads);
  check_scale(weight, given_scale);
  const Scale scale = Scale::ensure(given_scale);
  py::array_t<float> scores({weight.rows, weight.columns});
  float* const out = scores.mutable_data();
  const float* const factors = scale.data();
  const int64_t threads = useful_threads(num_threads, scores.nbytes());
  {
    py::gil_scoped_release no_gil;
    with_element(weight.element, [&](auto element) {
      using T = decltype(element);
      parallel_for(weight.rows, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          score(static_cast<const T*>(weight.data) + row * weight.row_stride, factors,
                weight.columns, out + row * weight.columns);
      });
    });
  }
  return scores;
}

py::array_t<bool> keep_of(const py::array& x, const py::array& given_scale, int64_t n, int64_t m,
                          const std::string& dtype, int64_t num_threads) {
  const Floating weight = floating_of(x, dtype, num_threads);
  check_scale(weight, given_scale);
  CHECK(m >= 1 && n >= 0 && n <= m, "n of m must satisfy 0 <= n <= m and m >= 1, got ", n, " of ",
        m);
  CHECK(weight.columns % m == 0, "m must divide the ", weight.columns, " columns, got ", m);
  const Scale scale = Scale::ensure(given_scale);
  py::array_t<bool> keep({weight.rows, weight.columns});
  bool* const out = keep.mutable_data();
  const float* const factors = scale.data();
  const int64_t threads = useful_threads(num_threads, 8 * keep.nbytes());
  std::atomic<bool> are_numbers{true};
  {
    py::gil_scoped_release no_gil;
    with_element(weight.element, [&](auto element) {
      parallel_for(weight.rows, threads, 1, [&](int64_t begin, int64_t end) {
        if (!keep_rows<decltype(element)>(weight, factors, n, m, begin, end, out))
          are_numbers = false;
      });
    });
  }
  CHECK(are_numbers, "a score is NaN: the weights or the activations are not finite");
  return keep;
}

}  // namespace

void register_api(py::module_& m) {
  m.def("wanda_scores", &scores_of, py::arg("weight"), py::arg("scale"), py::kw_only(),
        py::arg("dtype") = "float32", py::arg("num_threads") = 1,
        "|weight[o, c]| * scale[c], in float32.");
  m.def(
      "wanda_keep", &keep_of, py::arg("weight"), py::arg("scale"), py::kw_only(), py::arg("n"),
      py::arg("m"), py::arg("dtype") = "float32", py::arg("num_threads") = 1,
      "Whether a weight is among the n best scored of its m neighbours; the first of equal ones.");
}

}  // namespace bonsai_fast::wanda
