"""Tar shards: their index, written and read."""
