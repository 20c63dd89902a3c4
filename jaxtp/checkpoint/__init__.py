"""Checkpoints: trees of named weights on disk. It knows paths, dims and files, not modules, so `model` may call it."""
