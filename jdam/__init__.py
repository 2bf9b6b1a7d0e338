"""jdam: dense associative memory over probability measures."""

from importlib.metadata import version as _version

from jdam import plot as plot
from jdam import random as random
from jdam import theory as theory
from jdam._result import Recall as Recall
from jdam._result import Status as Status
from jdam._result import Trace as Trace
from jdam.adjoint import Implicit as Implicit
from jdam.adjoint import OneStep as OneStep
from jdam.adjoint import Unrolled as Unrolled
from jdam.attention import attend as attend
from jdam.energy import divergences as divergences
from jdam.energy import energy as energy
from jdam.energy import gibbs_weights as gibbs_weights
from jdam.fit import Fit as Fit
from jdam.fit import FitState as FitState
from jdam.fit import Learner as Learner
from jdam.fit import descend as descend
from jdam.fit import fit as fit
from jdam.fit import recall_error as recall_error
from jdam.geometry import Bures as Bures
from jdam.geometry import DotProduct as DotProduct
from jdam.geometry import EntropicBures as EntropicBures
from jdam.geometry import Euclidean as Euclidean
from jdam.geometry import Geometry as Geometry
from jdam.geometry import Sinkhorn as Sinkhorn
from jdam.measures import DiagonalGaussian as DiagonalGaussian
from jdam.measures import Gaussian as Gaussian
from jdam.measures import PointCloud as PointCloud
from jdam.memory import Memory as Memory
from jdam.memory import store as store
from jdam.recall import recall as recall
from jdam.recall import recall_batch as recall_batch
from jdam.recall import step as step
from jdam.search import Certified as Certified
from jdam.search import Exhaustive as Exhaustive
from jdam.separation import Entmax as Entmax
from jdam.separation import Epanechnikov as Epanechnikov
from jdam.separation import LogSumExp as LogSumExp
from jdam.sharding import shard as shard

__version__ = _version("jdam")
