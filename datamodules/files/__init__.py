"""Downloads, archives, and lists of files."""
