"""What the fused engine computes with: products, attention, masks, memory."""
