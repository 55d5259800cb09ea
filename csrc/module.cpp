// module.cpp: the Python module bonsai_fast._C; every feature registers itself.
#include <pybind11/pybind11.h>

#include "moments.hpp"
#include "slicing.hpp"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Structured slicing and per-channel statistics on CPU arrays.";
  bonsai_fast::slicing::register_api(m);
  bonsai_fast::moments::register_api(m);
}
