"""Layers: the SE block, the ends of residual blocks and Inception modules, SyncBN."""
