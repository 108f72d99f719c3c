"""Nets that turn images into features: by name, with their ordered blocks, facts and pretrained weights."""
