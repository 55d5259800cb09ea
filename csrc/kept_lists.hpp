// kept_lists.hpp: which units every sub-model keeps, as the lists that kernels gather by.
#pragma once

#include <pybind11/pybind11.h>

namespace bonsai_fast::kept_lists {

void register_api(pybind11::module_& m);

}  // namespace bonsai_fast::kept_lists
