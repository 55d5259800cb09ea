// kernel_table.hpp: the table of all kernels. A file that includes this defines BONSAI_FAST_ISA,
// its instruction set. All names here are local to that file.
#include <cstdint>
#include <cstring>

#include "column_steps.hpp"
#include "kernels.hpp"
#include "sums.hpp"

#define BONSAI_FAST_STRING(name) #name
#define BONSAI_FAST_NAME(name) BONSAI_FAST_STRING(name)
#define BONSAI_FAST_JOIN(prefix, name) prefix##name
#define BONSAI_FAST_TABLE(name) BONSAI_FAST_JOIN(kernels_, name)

namespace bonsai_fast {
namespace {

void column_moments(const Floating& x, int64_t begin, int64_t end, const Moments& out) {
  switch (x.element) {
    case Element::kFloat32:
      return column_moments_of<float>(x, begin, end, out);
    case Element::kFloat16:
      return column_moments_of<Float16>(x, begin, end, out);
    case Element::kBFloat16:
      return column_moments_of<BFloat16>(x, begin, end, out);
  }
}

void row_moments(const Floating& x, int64_t begin, int64_t end, const Moments& out) {
  switch (x.element) {
    case Element::kFloat32:
      return row_moments_of<float>(x, begin, end, out);
    case Element::kFloat16:
      return row_moments_of<Float16>(x, begin, end, out);
    case Element::kBFloat16:
      return row_moments_of<BFloat16>(x, begin, end, out);
  }
}

}  // namespace

extern const Kernels BONSAI_FAST_TABLE(BONSAI_FAST_ISA);
const Kernels BONSAI_FAST_TABLE(BONSAI_FAST_ISA) = {BONSAI_FAST_NAME(BONSAI_FAST_ISA),
                                                    column_moments,
                                                    row_moments,
                                                    kWindow,
                                                    kStepRows,
                                                    kMinBlockBytes};

}  // namespace bonsai_fast
