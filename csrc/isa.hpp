// isa.hpp: which of the compiled kernels run.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "kernels.hpp"

namespace bonsai_fast::isa {

// "portable", "avx2" or "avx512", if this processor can run it, or "best": the fastest.
const Kernels& kernels_for(const std::string& isa);

void register_api(pybind11::module_& m);

}  // namespace bonsai_fast::isa
