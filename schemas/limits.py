"""Upper bounds on what is accepted, each checked before the work that it bounds."""

# Settings and requests.
MOST_SIDE = 65_536  # pixels; what memory allows is found out later, and is far less
