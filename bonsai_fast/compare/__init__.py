"""Many pruning methods under one protocol."""
