"""WebDataset shards: written whole, read in any order, streamed in the same global batches on any number of ranks."""
