"""Upper bounds on what is accepted, each checked before the work that it bounds."""
