"""Random measures: those of the papers' experiments, and perturbations of exact radius."""

from jdam.random.clouds import separated_clouds as separated_clouds
from jdam.random.gaussians import wasserstein_sphere as wasserstein_sphere
from jdam.random.mixtures import separated_mixtures as separated_mixtures
from jdam.random.perturbations import perturb as perturb
