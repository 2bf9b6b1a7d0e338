"""Divergences between measures, and how to move along their gradients."""

from jdam.geometry._poses import Pose as Pose
from jdam.geometry.aligned import Aligned as Aligned
from jdam.geometry.bures import Bures as Bures
from jdam.geometry.chamfer import Chamfer as Chamfer
from jdam.geometry.entropic_bures import EntropicBures as EntropicBures
from jdam.geometry.euclidean import DotProduct as DotProduct
from jdam.geometry.euclidean import Euclidean as Euclidean
from jdam.geometry.mixture import MixtureWasserstein as MixtureWasserstein
from jdam.geometry.protocol import BatchSizes as BatchSizes
from jdam.geometry.protocol import Comparison as Comparison
from jdam.geometry.protocol import Geometry as Geometry
from jdam.geometry.protocol import Patterns as Patterns
from jdam.geometry.protocol import Retraction as Retraction
from jdam.geometry.sinkhorn import Sinkhorn as Sinkhorn
