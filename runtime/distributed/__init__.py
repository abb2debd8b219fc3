"""Vocabulary shards, sequence slices and global counts over many ranks."""
