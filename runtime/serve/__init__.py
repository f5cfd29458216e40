"""A server for programs: the images API of OpenAI, a bounded queue that batches its callers, and metrics."""
