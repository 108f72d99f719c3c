"""What the data sets of texts share."""
