"""Models on disk and in memory: loading, reading and writing safetensors, streaming."""
