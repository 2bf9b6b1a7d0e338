"""Kinds of probability measures: validated pytrees and their constructors.

The folder separates how a measure is represented from how measures are compared (`jdam.geometry`)
and stored (`jdam._memory`). It imports `jdam._core` only. A new kind of measure is a subclass of
`Measure` (`base.py`) in a file of its own; `jdam._memory.encoding` lists the kinds that `jdam.save`
can write.
"""
