"""LLM-TRSR at cluster scale: text-rich sequential recommendation with summarized histories."""

__version__ = "0.1.0"
