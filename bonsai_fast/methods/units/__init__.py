"""Methods that remove units: heads, KV groups, channels, sub-layers, layers."""
