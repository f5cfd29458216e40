"""Upper bounds on what is accepted, each checked before the work that it bounds."""

# Headers of weights files
MAX_HEADER_BYTES = 100_000_000  # of a safetensors header; the library's own limit
MAX_HEADER_ITEMS = 4_000_000  # commas and brackets in it: about 1 GB once parsed; 300,000 tensors have 2,700,000

# Pickled checkpoints: a tensor takes about 200 bytes of the pickle
MAX_PICKLE_BYTES = 8 << 20  # of data.pkl, whose every byte may become an object of 64 bytes or more
MAX_PICKLE_ENTRIES = 200_000  # looked at in all dictionaries, which may contain the same one again and again
MAX_PICKLE_DEPTH = 32  # of dictionaries inside one another; one that contains itself has no end
MAX_PICKLE_NAME = 1000  # characters of a tensor's name, all keys on the way to it together
MAX_ZIP_DIRECTORY = 16 << 20  # bytes; an entry of 50 bytes becomes an object of 600
