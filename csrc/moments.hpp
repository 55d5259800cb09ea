// moments.hpp: per-channel statistics of activations and weights.
#pragma once

#include <pybind11/pybind11.h>

namespace bonsai_fast::moments {

void register_api(pybind11::module_& m);

}  // namespace bonsai_fast::moments
