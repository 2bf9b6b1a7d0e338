"""The energy of a query in a memory: divergences, Gibbs weights and the average of the pulls.

The folder separates what an evaluation computes from the loop of steps in `_recall`. It may import
`_core`, `_measures`, `geometry` and `_memory`. A new energy is a subclass of `Separation`, in
`separation.py`; a new way to select the patterns of an evaluation is a subclass of `Search`, in
`search.py` or a file of its own; a new function of a memory and a query has a file of its own, as
`nearest.py`, and a line in `jdam/__init__.py`.
"""
