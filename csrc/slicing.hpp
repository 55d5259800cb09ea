// slicing.hpp: keep some rows or columns of a matrix.
#pragma once

#include <pybind11/pybind11.h>

namespace bonsai_fast::slicing {

void register_api(pybind11::module_& m);

}  // namespace bonsai_fast::slicing
