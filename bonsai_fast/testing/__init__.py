"""Model shapes and naive references for tests and benches."""
