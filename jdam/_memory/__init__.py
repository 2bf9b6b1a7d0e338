"""The memory: patterns, their geometry, their prior and their values.

The folder has all that creates, changes, stores or distributes a `Memory`. It may import `_core`,
`_measures` and `geometry`. A new change of a memory is a method of `Memory` in `memory.py`; for a
memory with capacity its compiled form is in `slots.py`. What is computed once of patterns belongs
to `prepared.py`; the file format is in `files.py` and `encoding.py`.
"""
