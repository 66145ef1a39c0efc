"""Shared-prefix attention for unmodified Hugging Face decoders: one layout, several back ends, equal results."""
