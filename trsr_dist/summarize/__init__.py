"""The summarization job: histories in, WebDataset shards with a preference summary per user out."""
