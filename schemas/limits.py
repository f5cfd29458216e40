"""Upper bounds on what is accepted, each checked before the work that it bounds."""

# Settings and requests.
MOST_SIDE = 65_536  # pixels; what memory allows is found out later, and is far less
MOST_STEPS = 10_000  # of one stage; all their timesteps are computed at once
MOST_WEIGHT = 1000  # guidance, shift and strengths; beyond it float32 latents overflow within a few steps
MOST_BATCH = 100_000  # images of one generator: the noise of those before an image is drawn, and thrown away
MOST_PICTURES = 64  # pictures, controls or LoRAs of one request; each is decoded before anything is drawn

# Images with settings.
MOST_SETTINGS = 4 << 20  # bytes of the JSON in a PNG; compressed text is not unpacked any further
MOST_PIXELS = 1 << 28  # of an image that the gallery shows; a browser decodes no larger ones

# The page's server.
MOST_CONNECTIONS = 512  # each has a thread and a file descriptor, of which a program has often 1024
MOST_BACKLOG = 1024  # connections that wait to be accepted; the kernel may allow fewer
MOST_HEAD = 64 << 10  # bytes of a request's line and headers
MOST_FIELDS = 16  # of a query
MOST_BODIES = 256 << 20  # bytes of all request bodies that are held at the same time
MOST_SHOWN_TEXT = 64 << 10  # characters of one setting in the gallery, which lists thousands of images
