// kept_lists.cpp: keep masks of many sub-models as rows of positions, all of the same length.
#include "kept_lists.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "arrays.hpp"
#include "check.hpp"
#include "parallel.hpp"

namespace py = pybind11;

namespace bonsai_fast::kept_lists {
namespace {

// Strides in bytes; a mask's units are neighbours.
struct Masks {
  const uint8_t* data;
  int64_t submodels, units, stride;
};

// Writes the positions of what one mask keeps, in order, then zeros up to `width`.
void list_kept(const uint8_t* mask, int64_t units, int64_t width, int32_t* list) {
  int64_t count = 0;
  // Every position is written, only kept ones are counted: no branch to mispredict. No write passes
  // the end of the list, since at most `width` are kept.
  for (int64_t unit = 0; unit < units && count < width; ++unit) {
    list[count] = static_cast<int32_t>(unit);
    count += mask[unit] != 0;
  }
  std::fill(list + count, list + width, 0);
}

py::tuple kept_lists_of(const py::array& keep, int64_t multiple, int64_t num_threads) {
  CHECK_TYPE(py::isinstance<py::array_t<bool>>(keep), "keep must be bool, got ", dtype_of(keep));
  CHECK(keep.ndim() == 2, "keep must be 2-D, got shape ", shape_of(keep));
  CHECK(multiple >= 1, "multiple must be at least 1, got ", multiple);
  CHECK(num_threads >= 1, "num_threads must be at least 1, got ", num_threads);
  CHECK(keep.size() == 0 || keep.shape(1) <= 1 || keep.strides(1) == 1,
        "keep must have the units of a sub-model next to each other; got strides ",
        std::string(py::str(keep.attr("strides"))));
  CHECK(keep.shape(1) <= std::numeric_limits<int32_t>::max(), "too many units: ", keep.shape(1));
  const Masks masks{static_cast<const uint8_t*>(keep.data()), keep.shape(0), keep.shape(1),
                    keep.strides(0)};
  py::array_t<int32_t> counts(masks.submodels);
  int32_t* const count_of = counts.mutable_data();
  const int64_t threads = useful_threads(num_threads, keep.nbytes());
  int64_t longest = 0;
  {
    py::gil_scoped_release no_gil;
    parallel_for(masks.submodels, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const uint8_t* const mask = masks.data + s * masks.stride;
        int32_t count = 0;
        for (int64_t unit = 0; unit < masks.units; ++unit) count += mask[unit] != 0;
        count_of[s] = count;
      }
    });
    for (int64_t s = 0; s < masks.submodels; ++s) longest = std::max<int64_t>(longest, count_of[s]);
  }
  const int64_t width = (longest + multiple - 1) / multiple * multiple;
  py::array_t<int32_t> lists({masks.submodels, width});
  int32_t* const list_of = lists.mutable_data();
  {
    py::gil_scoped_release no_gil;
    parallel_for(masks.submodels, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        list_kept(masks.data + s * masks.stride, masks.units, width, list_of + s * width);
    });
  }
  return py::make_tuple(lists, counts);
}

}  // namespace

void register_api(py::module_& m) {
  m.def("kept_lists", &kept_lists_of, py::arg("keep"), py::kw_only(), py::arg("multiple") = 1,
        py::arg("num_threads") = 1,
        "(positions that every row of keep marks, padded by 0 to one length; how many there are).");
}

}  // namespace bonsai_fast::kept_lists
