"""Learning: memories as parameters of optimizers, fits to queries and targets, descent of the
energy by an optimizer, and the β that denoises best.

The folder keeps optax and loops over data out of the code of recall. It may import all other
private folders (`jdam._core` to `jdam._recall`) and `jdam.geometry`; `jdam.nn` imports it. A new
way to learn is a file of its own, which takes its parameters from `parametrize`.
"""
