"""jdam: dense associative memory over probability measures.

A memory stores measures X₁ … X_N, the patterns. A geometry defines a divergence D between measures
and a descent step of a measure. They define the energy E(ξ) = −β⁻¹ log Σᵢ πᵢ exp(−β D(ξ, Xᵢ)), and
recall, which descends the energy from a query to a fixed point.

    memory = jdam.store(patterns)              # measures with one batch axis, or an array (N, d)
    result = jdam.recall(memory, query, beta)  # result.measure, result.nearest, result.status, …

The folders in the order of their dependencies. Each imports only folders that precede it in this
list:

    _core       extensions of JAX: batching, collectives, decompositions, loops, checks
    _measures   kinds of measures: `Gaussian`, `DiagonalGaussian`, `GaussianMixture`, `PointCloud`
    _entropic   entropic transport between point clouds
    geometry    divergences and steps: `Bures`, `EntropicBures`, `MixtureWasserstein`, `Sinkhorn`,
                `Chamfer`, `Aligned`, `Euclidean`, `DotProduct`
    _memory     `Memory`, `store`, capacity for more patterns, cells, files, `shard`
    _energy     Gibbs averages over the patterns; separations and searches; `pairwise`, `match`,
                `suggest_beta`
    _recall     `step`, `recall`, their results and derivatives; `attend`
    _learning   `parametrize`, `fit`, `descend`
    nn, sklearn, theory, random, plot, demo

The main files of a recall: `_recall/recall.py` checks the arguments, `_recall/solver.py` is the
loop of steps and evaluations, `_energy/average.py` or `_energy/certified.py` evaluates the Gibbs
average over the patterns, `_energy/separation.py` has the weights, and the file of the geometry, as
`geometry/bures.py`, has the formulas of `compare` and `move`. A new geometry is a class with the
methods `check` and `compare`; see `jdam.Geometry`.
"""

from importlib.metadata import version as _version

from jdam import geometry as geometry
from jdam import nn as nn
from jdam import plot as plot
from jdam import random as random
from jdam import theory as theory
from jdam._cite import cite as cite
from jdam._energy.calibration import Calibration as Calibration
from jdam._energy.calibration import calibrate as calibrate
from jdam._energy.certified import Certified as Certified
from jdam._energy.choosing import neighbour_divergence as neighbour_divergence
from jdam._energy.choosing import suggest_beta as suggest_beta
from jdam._energy.energy import divergences as divergences
from jdam._energy.energy import energy as energy
from jdam._energy.energy import gibbs_weights as gibbs_weights
from jdam._energy.match import Match as Match
from jdam._energy.match import match as match
from jdam._energy.nearest import nearest as nearest
from jdam._energy.pairs import pairwise as pairwise
from jdam._energy.search import Exhaustive as Exhaustive
from jdam._energy.search import Search as Search
from jdam._energy.separation import Entmax as Entmax
from jdam._energy.separation import Epanechnikov as Epanechnikov
from jdam._energy.separation import LogSumExp as LogSumExp
from jdam._energy.separation import Separation as Separation
from jdam._learning.denoising import denoising_beta as denoising_beta
from jdam._learning.fit import Fit as Fit
from jdam._learning.fit import FitState as FitState
from jdam._learning.fit import Learner as Learner
from jdam._learning.fit import descend as descend
from jdam._learning.fit import fit as fit
from jdam._learning.fit import recall_error as recall_error
from jdam._learning.parametrize import parametrize as parametrize
from jdam._measures.base import Measure as Measure
from jdam._measures.batches import stack as stack
from jdam._measures.gaussian import DiagonalGaussian as DiagonalGaussian
from jdam._measures.gaussian import Gaussian as Gaussian
from jdam._measures.mixture import GaussianMixture as GaussianMixture
from jdam._measures.point_cloud import PointCloud as PointCloud
from jdam._memory.files import load as load
from jdam._memory.files import save as save
from jdam._memory.mapped import MappedMemory as MappedMemory
from jdam._memory.mapped import open as open
from jdam._memory.memory import Memory as Memory
from jdam._memory.memory import store as store
from jdam._memory.sharding import shard as shard
from jdam._recall.acceleration import Acceleration as Acceleration
from jdam._recall.acceleration import Anderson as Anderson
from jdam._recall.acceleration import TrustRegion as TrustRegion
from jdam._recall.adjoint import Adjoint as Adjoint
from jdam._recall.adjoint import Implicit as Implicit
from jdam._recall.adjoint import OneStep as OneStep
from jdam._recall.adjoint import Unrolled as Unrolled
from jdam._recall.attention import attend as attend
from jdam._recall.recall import recall as recall
from jdam._recall.recall import recall_batch as recall_batch
from jdam._recall.recall import step as step
from jdam._recall.result import Recall as Recall
from jdam._recall.result import Status as Status
from jdam._recall.result import Trace as Trace
from jdam.geometry import Aligned as Aligned
from jdam.geometry import BatchSizes as BatchSizes
from jdam.geometry import Bures as Bures
from jdam.geometry import Chamfer as Chamfer
from jdam.geometry import Comparison as Comparison
from jdam.geometry import DotProduct as DotProduct
from jdam.geometry import EntropicBures as EntropicBures
from jdam.geometry import Euclidean as Euclidean
from jdam.geometry import Geometry as Geometry
from jdam.geometry import MixtureWasserstein as MixtureWasserstein
from jdam.geometry import Patterns as Patterns
from jdam.geometry import Pose as Pose
from jdam.geometry import Retraction as Retraction
from jdam.geometry import Sinkhorn as Sinkhorn

__version__ = _version("jdam")
