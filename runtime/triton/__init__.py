"""The Python models of a repository for Triton Inference Server; `converters.triton` writes such repositories."""
