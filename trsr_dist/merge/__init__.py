"""From a base model and a LoRA adapter to one plain Hugging Face folder, streamed and proven equal."""
