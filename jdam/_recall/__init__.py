"""Recall: the descent of the energy from a query, its result and its derivatives.

The folder separates the loop of steps from the evaluations in `_energy`. It may import `_core`,
`_measures`, `geometry`, `_memory` and `_energy`. A new acceleration is a subclass of
`Acceleration`, in `acceleration.py`; a new derivative is a subclass of `Adjoint`, in `adjoint.py`;
what every recall does belongs to the loop in `solver.py`, checks of arguments to `recall.py`.
"""
