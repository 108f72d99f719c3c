"""Splits, the order of samples, and random numbers by seed."""
