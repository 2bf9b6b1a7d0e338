"""Recall: descent of the energy, its result and its derivatives."""
