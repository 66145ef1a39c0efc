"""What a run will cost, before it is paid: from a model's config, histories or shards, and a cluster's description."""
