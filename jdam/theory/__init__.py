"""Constants and theorems of the papers as functions of a memory: separations, basins, bounds on the
recall error, sufficient β, capacities and certificates.

The folder keeps statements about recall apart from the code of recall, which does not import it.
It imports `jdam._core`, `jdam._entropic`, `jdam._measures`, `jdam.geometry`, `jdam._memory` and
`jdam._energy`. Bounds by Gibbs sums over the other patterns belong in `basins.py`, proofs for a
single query in `certificates.py`, closed-form capacities in `capacity.py`, and constants of the SHK
metric of point clouds in `shk.py`.
"""

from jdam.theory.basins import basin_radius as basin_radius
from jdam.theory.basins import contraction_bound as contraction_bound
from jdam.theory.basins import fidelity as fidelity
from jdam.theory.basins import interference as interference
from jdam.theory.basins import margins as margins
from jdam.theory.basins import minimum_beta as minimum_beta
from jdam.theory.basins import one_step_bound as one_step_bound
from jdam.theory.basins import separations as separations
from jdam.theory.basins import transition_beta as transition_beta
from jdam.theory.capacity import cloud_capacity as cloud_capacity
from jdam.theory.capacity import commuting_capacity as commuting_capacity
from jdam.theory.capacity import general_beta as general_beta
from jdam.theory.capacity import general_capacity as general_capacity
from jdam.theory.certificates import Certificate as Certificate
from jdam.theory.certificates import certify as certify
from jdam.theory.shk import ShkConstants as ShkConstants
from jdam.theory.shk import shk_constants as shk_constants
from jdam.theory.shk import shk_drift_bound as shk_drift_bound
from jdam.theory.shk import shk_iterations as shk_iterations
from jdam.theory.shk import shk_travel_bound as shk_travel_bound
from jdam.theory.shk import weight_stiffness as weight_stiffness
