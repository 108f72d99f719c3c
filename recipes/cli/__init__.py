"""The command line: what serves all recipes between what is typed and the first step, and after the last."""
