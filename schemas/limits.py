"""Upper bounds on what is accepted, each checked before the work that it bounds."""

MAX_LORA_TENSORS = 20_000  # of a LoRA file; these networks have 1,700 weights to change, with ten keys at most
MAX_PATTERNS = 4_000  # of an adapter's settings for single modules, of which PEFT itself writes one for each module
MAX_PATTERN_LENGTH = 500  # characters of such a pattern, which is a regular expression
MAX_PATTERN_PATHS = 1_000_000  # ways to try all of them on one name; a thousand names then take some seconds
