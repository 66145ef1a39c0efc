"""What tools/inspect_shards.py finds: damage, leaks, duplicates, shortcuts, token lengths."""
