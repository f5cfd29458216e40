"""Many images on a Ray cluster: the stages of the cascade in actors of their own."""
