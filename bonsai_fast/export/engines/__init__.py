"""Scripts that run prompts in an engine, each in a process of its own."""
