"""From a checkpoint to its use elsewhere: exports, and requests to a server."""
