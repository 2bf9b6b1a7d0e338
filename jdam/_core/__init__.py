"""Numerical and array functions that have nothing to do with measures.

The folder holds batching, loops, collectives on meshes, decompositions with safe derivatives,
compilation, argument checks and progress bars. It imports nothing else of jdam. Add a function here
if it takes arrays and pytrees only and is used by several other folders.
"""
