"""Data and pure functions: stages, configs, layouts, key maps, ports, manifests, settings, errors. No I/O, no torch."""
