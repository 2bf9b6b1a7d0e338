"""Entropic optimal transport between weighted point clouds."""
