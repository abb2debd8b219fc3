"""Multi-rank support: vocabulary shards, sequence slices and global counts."""
