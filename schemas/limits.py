"""Upper bounds on what is accepted, each checked before the work that it bounds."""

# Bundles
MAX_MANIFEST_BYTES = 1 << 26  # a bundle of every stage with hundreds of plans has less than a megabyte
MAX_NAME_BYTES = 255  # of a file's name: what Linux and its file systems take
MAX_PATH_PARTS = 16  # folders on the way to a file of a bundle; there are three at most
MAX_FILE_BYTES = (1 << 63) - 1  # file positions are signed 64-bit integers
MAX_DIMENSION = 1 << 40  # of a port: no tensor with such an axis fits into memory
MAX_SIDE = 1 << 16  # pixels of a side of an image: PNG writers and networks end before
VQGAN_SCALES = (1e-3, 1e3)  # least and largest; the layouts have 0.3764 and 0.43

# Tokenizers
MAX_TOKENIZER_BYTES = 1 << 25  # of a file of a tokenizer's folder; CLIP's largest has 3.6 MB
MAX_ADDED_TOKENS = 1 << 16  # textual inversions add a few tokens each
