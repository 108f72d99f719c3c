"""What every recipe does around its step."""
