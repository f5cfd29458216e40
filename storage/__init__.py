"""What lies on disk: weights files read and written, outputs that appear whole, bundles opened and checked."""
