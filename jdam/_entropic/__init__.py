"""Entropic optimal transport between weighted point clouds, on plain arrays.

The folder is separate from `geometry`, so that its solvers and derivatives depend on neither
measures nor memories. It imports only `_core`. Add ground costs as a `Cost`, and solvers beside
`scaling.solve`.
"""
