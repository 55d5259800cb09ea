// isa.cpp: which of the compiled kernels this processor can run.
#include "isa.hpp"

#include <pybind11/stl.h>

#include <vector>

#include "check.hpp"

namespace py = pybind11;

namespace bonsai_fast {

extern const Kernels kernels_portable;
#if defined(BONSAI_FAST_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace isa {
namespace {

// Slowest first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found = {&kernels_portable};
#if defined(BONSAI_FAST_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("fma")) {
    found.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vbmi2"))
      found.push_back(&kernels_avx512);
  }
#endif
  return found;
}

}  // namespace

const Kernels& kernels_for(const std::string& isa) {
  static const std::vector<const Kernels*> found = runnable();
  if (isa == "best") return *found.back();
  std::string names;
  for (const Kernels* kernels : found) {
    if (isa == kernels->name) return *kernels;
    names += concatenate("\"", kernels->name, "\", ");
  }
  throw std::invalid_argument(
      concatenate("isa must be one of ", names, "or \"best\" here, got \"", isa, "\""));
}

void register_api(py::module_& m) {
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : runnable()) names.push_back(kernels->name);
        return names;
      },
      "The values of `isa` that this processor can run, slowest first.");
}

}  // namespace isa
}  // namespace bonsai_fast
