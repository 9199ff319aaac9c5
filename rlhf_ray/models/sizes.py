"""Sizes that both the models and the plan of their memory depend on."""

CHUNK_TOKENS = 512
"""Tokens whose logits exist at the same time: 512 x 50k float32 logits are 100 MB."""
