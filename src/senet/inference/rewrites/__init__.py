"""The rewrites of `senet.optimize`: each file one, `senet.inference.rewrite` their order."""
