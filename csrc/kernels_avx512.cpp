// kernels_avx512.cpp: the kernels for AVX-512 with VBMI2.
#define BONSAI_FAST_ISA avx512
#include "kernel_table.hpp"
