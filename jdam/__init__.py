"""jdam: dense associative memory over probability measures."""

from importlib.metadata import version as _version

from jdam.adjoint import Unrolled as Unrolled
from jdam.energy import divergences as divergences
from jdam.energy import energy as energy
from jdam.energy import gibbs_weights as gibbs_weights
from jdam.geometry import Bures as Bures
from jdam.geometry import DotProduct as DotProduct
from jdam.geometry import Euclidean as Euclidean
from jdam.geometry import Geometry as Geometry
from jdam.geometry import Sinkhorn as Sinkhorn
from jdam.measures import DiagonalGaussian as DiagonalGaussian
from jdam.measures import Gaussian as Gaussian
from jdam.measures import PointCloud as PointCloud
from jdam.memory import Memory as Memory
from jdam.memory import store as store
from jdam.recall import Recall as Recall
from jdam.recall import Status as Status
from jdam.recall import Trace as Trace
from jdam.recall import recall as recall
from jdam.recall import step as step
from jdam.search import Exhaustive as Exhaustive

__version__ = _version("jdam")
