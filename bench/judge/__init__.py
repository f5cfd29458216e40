"""Says whether a picture of the small cascade shows what its caption asked for."""
