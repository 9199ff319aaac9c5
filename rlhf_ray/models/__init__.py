"""Loading models, and computing per-token numbers with them."""
