"""The memory: patterns, their geometry and their prior, on one device or many."""
