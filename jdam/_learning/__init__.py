"""Learning patterns from measures."""
