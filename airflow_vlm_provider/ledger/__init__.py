"""What is done: the manifest, which is the commit, and the dead letters beside it."""
