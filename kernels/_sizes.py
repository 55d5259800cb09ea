"""Sizes that index tables and kernels agree on. Needs no Triton: tables are made on the CPU."""

# Rows of one tile. Every kernel over grouped rows uses this number.
BLOCK_ROWS = 128
# Entries after each list of kept units. Kernels fetch one tile ahead and may read them.
INDEX_PADDING = 128
