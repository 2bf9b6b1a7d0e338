"""Estimators for scikit-learn: a memory that classifies, and its Gibbs weights as features.

    model = jdam.sklearn.MemoryClassifier().fit(list_of_arrays, labels)
    model.predict(others)

They go into pipelines, `cross_val_score` and `GridSearchCV`. Numbers of atoms and of queries are
filled up to few sizes, so that folds and later calls share compiled programs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import softmax
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from jdam._core import checks
from jdam._core.batching import batch_size, power_of_two
from jdam._energy.choosing import suggest_beta
from jdam._energy.energy import inverse_temperature
from jdam._energy.pairs import pairwise
from jdam._measures.base import AnyMeasure, Measure
from jdam._measures.batches import stack
from jdam._measures.gaussian import Gaussian
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud, unchecked
from jdam._measures.ragged import build, check_ragged
from jdam._measures.simplex import uniform_weights
from jdam._memory.memory import Memory, store
from jdam.geometry import Chamfer, Geometry, Sinkhorn

_T = TypeVar("_T")
#: What samples become, and the geometries of clouds that have a name, in units of the patterns.
MEASURES = ("cloud", "gaussian", "mixture")
NAMED: dict[str, Any] = {"Sinkhorn": Sinkhorn, "Chamfer": Chamfer}
#: ε in these units unless it is given.
EPSILON = 0.05
#: How many measures to compare with the patterns, and to fit mixtures to, at a time at most.
AT_ONCE, FITTED_AT_ONCE = 256, 16


class _MemoryEstimator(BaseEstimator):  # type: ignore[misc]
    """A memory of what was fitted, and Gibbs weights over it."""

    def __init__(
        self,
        measure: str = "cloud",
        *,
        geometry: str | Geometry | None = None,
        beta: float | None = None,
        epsilon: float | None = None,
        rho: float | None = None,
        num_components: int = 3,
        seed: int = 0,
    ):
        self.measure = measure
        self.geometry = geometry
        self.beta = beta
        self.epsilon = epsilon
        self.rho = rho
        self.num_components = num_components
        self.seed = seed

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        return tags

    def _store(self, X: Any, labels: np.ndarray | None) -> None:
        """Store the measures, and choose β unless it is given."""
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {MEASURES}; got {self.measure!r}")
        given = _batch_of(X)
        if labels is not None and len(labels) != batch_size(given):
            got = f"inconsistent numbers, {len(labels)} and {batch_size(given)}"
            raise ValueError(f"y must have a label for each of X; got {got}")
        num_atoms = _rounded_up(given.num_atoms) if isinstance(given, PointCloud) else 0
        patterns = self._measures(given, num_atoms)
        memory = store(patterns, self._geometry(patterns), values=labels, progress=False)
        if self.beta is None:
            beta = suggest_beta(memory, pattern_labels=labels, progress=False)
        else:
            beta = inverse_temperature(memory, self.beta)
        self.memory_: Memory = memory
        self.beta_ = float(beta)
        self.n_features_in_ = int(patterns.dim)
        self._num_atoms = num_atoms

    def _weights(self, X: Any) -> np.ndarray:
        """The Gibbs weights (Q, N) at β."""
        check_is_fitted(self)
        given = _batch_of(X)
        if given.dim != self.n_features_in_:
            raise ValueError(
                f"X has {given.dim} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        queries = self._measures(given, self._num_atoms)
        compared = _in_parts(partial(pairwise, self.memory_, progress=False), queries)
        weights: np.ndarray = softmax(-self.beta_ * compared.astype(float), axis=1)
        return weights

    def _measures(self, given: Measure, num_atoms: int) -> AnyMeasure:
        """The batch as measures of the kind that is wanted, those of samples filled up to
        `num_atoms`, or where they have more to a power of two."""
        if not isinstance(given, PointCloud):
            return given
        cloud: PointCloud = jax.tree.map(np.asarray, given)  # JAX would compile every shape
        if cloud.num_atoms > num_atoms:
            num_atoms = power_of_two(cloud.num_atoms)
        cloud = cloud.padded(n=num_atoms)
        if self.measure == "cloud":
            return jax.tree.map(jax.device_put, cloud)
        if cloud.features is not None:
            raise ValueError(f"X must have no features with measure={self.measure!r}; got some")
        if self.measure == "gaussian":
            fit: Any = _gaussians
        else:
            num = checks.positive_int("num_components", self.num_components)
            least = int((cloud.weights > 0).sum(-1).min())
            if num > least:
                wanted = f"at most {least}, the number of atoms of one of X"
                raise ValueError(f"num_components must be {wanted}; got {num}")
            fit = partial(_mixtures, jax.random.key(self.seed), num_components=num)
        return jax.tree.map(jax.device_put, _in_parts(fit, cloud))

    def _geometry(self, patterns: AnyMeasure) -> Geometry | None:
        """The geometry of the patterns; None for that which `store` chooses."""
        name = self.geometry
        if name is None and isinstance(patterns, PointCloud):
            name = "Sinkhorn"
        if isinstance(name, str):
            if name not in NAMED:
                raise ValueError(
                    f"geometry must be one of {tuple(NAMED)}, a jdam geometry or None; got {name!r}"
                )
            epsilon = EPSILON if self.epsilon is None else self.epsilon
            found: Geometry = NAMED[name].relative(patterns, epsilon, rho=self.rho)
            return found
        for parameter in ("epsilon", "rho"):
            if getattr(self, parameter) is not None:
                which = f"geometry={name!r}" if name else "the geometry of Gaussians and mixtures"
                raise ValueError(
                    f"{parameter} must be None with {which}: it is one of 'Sinkhorn' and 'Chamfer' "
                    f"by name; got {getattr(self, parameter)!r}"
                )
        return name


class MemoryClassifier(ClassifierMixin, _MemoryEstimator):  # type: ignore[misc]
    """A classifier of measures: the Gibbs weights of the measures it was fitted to, by class.

        P(c | ξ) = Σ_{i: yᵢ = c} wᵢ(ξ),   wᵢ(ξ) ∝ exp(−β D(ξ, Xᵢ)).

    **X** is a list of arrays (nᵢ, d), an array (N, n, d), or a batch of measures of jdam; y has
    N labels, numbers or strings. Arrays and `jdam.PointCloud`s are samples, which become what
    `measure` says; other measures are stored as they are.

    **Arguments**, the same for `MemoryTransformer`:

    - `measure`: "cloud", the samples themselves; "gaussian", their mean and covariance; "mixture",
      the Gaussian mixture that they are likeliest of.
    - `geometry`: "Sinkhorn" or "Chamfer", in units of the patterns as by `Sinkhorn.relative`; a
      geometry of jdam, taken as it is; or None, for which clouds have "Sinkhorn", Gaussians `Bures`
      and mixtures `MixtureWasserstein`.
    - `beta` > 0, in the inverse units of D; if None, `jdam.suggest_beta` of the patterns, with
      their classes where there are labels.
    - `epsilon` and `rho`: ε and ρ of a geometry by name, in units of the patterns, the median of
      ½|x−y|² within them; 0.05 and no ρ if None.
    - `num_components`, `seed`: of mixtures. All have the same `seed`.

    **Attributes** after `fit`: `classes_`, in rising order; `memory_`, whose values are indices of
    classes; `beta_`; `n_features_in_`, which is d.

    **Raises:** `fit` raises `ValueError` or `TypeError` for arguments that are not of these kinds,
    for ε or ρ of a geometry that is not given by name, and as `jdam.store`.
    """

    def fit(self, X: Any, y: Any) -> "MemoryClassifier":
        """Stores the measures X with their classes y (N,), and chooses β."""
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        self._store(X, labels.astype(np.int32))
        self.classes_ = classes
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The Gibbs weights of the patterns of each class, summed: (Q, number of classes), rows of
        sum 1. They are probabilities of the model, calibrated where β is."""
        weights = self._weights(X)
        labels = np.asarray(self.memory_.values)
        found: np.ndarray = weights @ (labels[:, None] == np.arange(len(self.classes_)))
        return found

    def predict(self, X: Any) -> np.ndarray:
        """The class of largest probability of each query, (Q,)."""
        probabilities = self.predict_proba(X)
        found: np.ndarray = self.classes_[probabilities.argmax(1)]
        return found


class MemoryTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _MemoryEstimator):  # type: ignore[misc]
    """The Gibbs weights of measures over those it was fitted to, as features.

    X and the arguments are those of `MemoryClassifier`. Labels y, if there are, choose β.

    **Attributes** after `fit`: `memory_`; `beta_`; `n_features_in_`, which is d.
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags

    def fit(self, X: Any, y: Any = None) -> "MemoryTransformer":
        """Stores the measures X, and chooses β, by classes y (N,) where these are given."""
        labels = None if y is None else np.unique(column_or_1d(y), return_inverse=True)[1]
        self._store(X, None if labels is None else labels.astype(np.int32))
        self._n_features_out = len(self.memory_)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The Gibbs weights wᵢ(ξ) ∝ exp(−β D(ξ, Xᵢ)): (Q, N), rows of sum 1."""
        return self._weights(X)


def _batch_of(X: Any) -> Measure:
    """X as a batch of measures; arrays as clouds, in JAX's default dtype."""
    if isinstance(X, Measure):
        if len(X.batch_shape) != 1:
            raise ValueError(f"X must have one batch axis; got batch shape {X.batch_shape}")
        return X
    if isinstance(X, list | tuple) and X and isinstance(X[0], Measure):
        stacked: Measure = stack(X)
        return stacked
    if isinstance(X, list | tuple) or (isinstance(X, np.ndarray) and X.dtype.kind == "O"):
        arrays = [_floats(f"X[{i}]", array) for i, array in enumerate(X)]
        for i, array in enumerate(arrays):
            if array.ndim != 2:
                raise ValueError(f"X[{i}] must be an array (n, d); got shape {array.shape}")
        found: PointCloud = build(unchecked, "cloud", check_ragged("X", "cloud", arrays, None))
        checks.finite("X", found.points)
        return found
    array = _floats("X", X)
    if array.ndim != 3 or 0 in array.shape:
        wanted = "a list of arrays (n, d), an array (N, n, d), N, n, d ≥ 1, or measures of jdam"
        raise ValueError(f"X must be {wanted}; got shape {array.shape}")
    checks.finite("X", array)
    uniform: Any = uniform_weights(array)
    return unchecked(array, uniform)


def _floats(name: str, array: Any) -> Any:
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers; got dtype {array.dtype}")
    return array.astype(jnp.zeros(()).dtype)


def _in_parts(function: Callable[[Any], _T], measures: AnyMeasure) -> _T:
    """`function` of the measures, on the host, some at a time: numbers of them that are a power of
    two at most, the last ones filled up with copies of the last."""
    num = batch_size(measures)
    width = min(AT_ONCE, power_of_two(num))
    host = jax.tree.map(np.asarray, measures)
    parts = []
    for start in range(0, num, width):
        rows = np.minimum(np.arange(start, start + width), num - 1)
        found = function(jax.tree.map(lambda leaf, rows=rows: jax.device_put(leaf[rows]), host))
        parts.append(jax.tree.map(np.asarray, found))
    joined: _T = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num], *parts)
    return joined


def _gaussians(clouds: PointCloud) -> Gaussian:
    return Gaussian.from_samples(clouds.points, clouds.weights)


@partial(jax.jit, static_argnames="num_components")
def _mixtures(key: Array, clouds: PointCloud, *, num_components: int) -> GaussianMixture:
    """A mixture of each cloud, by one key: it does not depend on the clouds beside it."""

    def one(cloud: PointCloud) -> GaussianMixture:
        weights = cloud.weights
        return GaussianMixture.from_samples(cloud.points, num_components, key=key, weights=weights)

    fitted: GaussianMixture = jax.lax.map(one, clouds, batch_size=FITTED_AT_ONCE)
    return fitted


def _rounded_up(size: int) -> int:
    """The least number that is not less, of four from each power of two to the next."""
    step = max(1, power_of_two(size) // 8)
    return -(-size // step) * step
