// kernels_portable.cpp: the kernels for any processor.
#define BONSAI_FAST_ISA portable
#include "kernel_table.hpp"
