"""What a run will cost, before it is paid, from model config, shards and a description of the cluster."""
