"""MINI-LLM: weight times gradient times activation, without a backward pass."""
