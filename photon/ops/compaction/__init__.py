"""Compaction: rows of many tensors moved by one index list in one pass."""
