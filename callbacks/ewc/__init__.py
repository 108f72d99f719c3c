"""Elastic weight consolidation; this folder can be copied whole into any project."""
