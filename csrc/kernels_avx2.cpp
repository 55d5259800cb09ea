// kernels_avx2.cpp: the kernels for AVX2 and F16C.
#define BONSAI_FAST_ISA avx2
#include "kernel_table.hpp"
