"""Names of floating-point dtypes, as safetensors headers have them."""

FLOATS = ("F16", "BF16", "F32", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")  # cast from, never to
