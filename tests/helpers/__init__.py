"""Helpers that several tests share: stand-ins, small models, planted faults."""
