"""Bundles: graphs and weights written, quantised, and checked."""
