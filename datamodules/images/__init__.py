"""What the data sets of images share."""
