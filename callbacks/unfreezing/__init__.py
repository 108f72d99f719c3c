"""Freezing, for good or until its time has come; this folder can be copied whole into any project."""
