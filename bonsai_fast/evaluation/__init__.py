"""Text, perplexity, zero-shot tasks, completions and peak memory."""
