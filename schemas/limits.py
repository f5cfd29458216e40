"""Upper bounds on what is accepted, each checked before the work that it bounds."""

MOST_FOLDER_ENTRIES = 10_000  # files in a folder taken for a model; the largest repository has some hundred
