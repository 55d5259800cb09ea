// module.cpp: the Python module bonsai_fast._C; every feature registers itself.
#include <pybind11/pybind11.h>

#include "isa.hpp"
#include "kept_lists.hpp"
#include "moments.hpp"
#include "slicing.hpp"
#include "wanda.hpp"

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Structured slicing, lists of kept units, and statistics of activations and weights on CPU "
      "arrays.";
  bonsai_fast::isa::register_api(m);
  bonsai_fast::kept_lists::register_api(m);
  bonsai_fast::slicing::register_api(m);
  bonsai_fast::moments::register_api(m);
  bonsai_fast::wanda::register_api(m);
}
