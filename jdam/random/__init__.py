"""Random measures: the patterns of the papers' experiments, and perturbations at an exact distance.

The folder provides patterns and queries for experiments and tests. It imports `jdam._core` and
`jdam._measures` only. A new distribution is a function of a random key in the file of its kind of
measure; random directions and rotations are in `_uniform.py`.
"""

from jdam.random.clouds import separated_clouds as separated_clouds
from jdam.random.gaussians import wasserstein_sphere as wasserstein_sphere
from jdam.random.mixtures import separated_mixtures as separated_mixtures
from jdam.random.perturbations import perturb as perturb
