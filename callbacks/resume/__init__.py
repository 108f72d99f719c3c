"""Runs that go on bit for bit after an interruption; this folder can be copied whole into any project."""
