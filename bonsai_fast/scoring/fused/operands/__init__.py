"""The weights that a sub-layer of the fused engine is run with."""
