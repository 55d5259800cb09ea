// arrays.hpp: checks NumPy arrays and reads them as matrices.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <string>

#include "check.hpp"
#include "half.hpp"
#include "kernels.hpp"

namespace bonsai_fast {

inline std::string shape_of(const pybind11::array& array) {
  return pybind11::str(array.attr("shape"));
}
inline std::string dtype_of(const pybind11::array& array) { return pybind11::str(array.dtype()); }

// How an array of `dtype` is stored: NumPy has no bfloat16, so 16-bit floats come as their bits.
inline Element element_of(const pybind11::array& x, const std::string& dtype) {
  const auto check_storage = [&](const pybind11::dtype& storage) {
    CHECK_TYPE(x.dtype().equal(storage), "x of dtype=\"", dtype, "\" must be stored as ",
               std::string(pybind11::str(storage)), ", got ", dtype_of(x));
  };
  if (dtype == "float32") {
    check_storage(pybind11::dtype::of<float>());
    return Element::kFloat32;
  }
  CHECK(dtype == "float16" || dtype == "bfloat16",
        "dtype must be \"float32\", \"float16\" or \"bfloat16\", got \"", dtype, "\"");
  check_storage(pybind11::dtype::of<uint16_t>());
  return dtype == "float16" ? Element::kFloat16 : Element::kBFloat16;
}

inline Floating floating_of(const pybind11::array& x, const std::string& dtype,
                            int64_t num_threads) {
  CHECK(x.ndim() == 2, "x must be 2-D, got shape ", shape_of(x));
  const bool readable = (x.flags() & pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0 &&
                        (x.shape(1) <= 1 || x.strides(1) == x.itemsize()) &&
                        x.strides(0) % x.itemsize() == 0;
  CHECK(x.size() == 0 || readable,
        "x must be aligned, with the elements of a row next to each other; got shape ", shape_of(x),
        " and strides ", std::string(pybind11::str(x.attr("strides"))));
  CHECK(num_threads >= 1, "num_threads must be at least 1, got ", num_threads);
  return {element_of(x, dtype), x.data(), x.shape(0), x.shape(1), x.strides(0) / x.itemsize()};
}

// Calls body(T{}) with the C++ type of the elements.
template <typename Body>
void with_element(Element element, const Body& body) {
  switch (element) {
    case Element::kFloat32:
      return body(float{});
    case Element::kFloat16:
      return body(Float16{});
    case Element::kBFloat16:
      return body(BFloat16{});
  }
}

}  // namespace bonsai_fast
