"""What a run will cost, from a model's config and token counts alone. Pure: no torch, no weights."""
