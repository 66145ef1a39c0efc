"""Base models, adapters and the forward pass."""
