// wanda.hpp: scores of single weights.
#pragma once

#include <pybind11/pybind11.h>

namespace bonsai_fast::wanda {

void register_api(pybind11::module_& m);

}  // namespace bonsai_fast::wanda
