"""Scripts that run prompts in an engine, each in a separate process."""
