"""Makes a small Llama and its tokenizer from a run's own train texts, for machines without weights."""
