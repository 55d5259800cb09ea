"""What the fused engine computes with: matrix products, attention, masks of rows, buffers."""
