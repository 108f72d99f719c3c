"""One page that says how good a model is and how it came about; this folder can be copied whole into any project."""
