"""Estimators for scikit-learn: classification by a memory, and its Gibbs weights as features.

    model = jdam.sklearn.MemoryClassifier().fit(list_of_arrays, labels)
    model.predict(others)

They work in pipelines, `cross_val_score` and `GridSearchCV`. Numbers of atoms and of queries are
padded to few sizes, so that folds and later calls share compiled programs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree
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
#: The kinds of measures that samples become, and the geometries of clouds that have names.
MEASURES = ("cloud", "gaussian", "mixture")
GEOMETRIES: dict[str, Any] = {"Sinkhorn": Sinkhorn, "Chamfer": Chamfer}
#: The default ε, in units of the patterns.
EPSILON = 0.05
#: The largest numbers of queries to compare at once, and of mixtures to fit at once.
BATCH_SIZE, FIT_BATCH_SIZE = 256, 16


class _MemoryEstimator(BaseEstimator):  # type: ignore[misc]
    """Memory of the measures it was fitted to, and their Gibbs weights."""

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

    def _store(self, X: PyTree, labels: np.ndarray | None) -> None:
        """Store the measures, and choose β if it is None."""
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {MEASURES}; got {self.measure!r}")
        batch = _as_batch(X)
        if labels is not None and len(labels) != batch_size(batch):
            got = f"inconsistent numbers, {len(labels)} and {batch_size(batch)}"
            raise ValueError(f"y must have a label for each of X; got {got}")
        num_atoms = _padded_size(batch.num_atoms) if isinstance(batch, PointCloud) else 0
        patterns = self._to_measures(batch, num_atoms)
        memory = store(patterns, self._geometry(patterns), values=labels, progress=False)
        if self.beta is None:
            beta = suggest_beta(memory, pattern_labels=labels, progress=False)
        else:
            beta = inverse_temperature(memory, self.beta)
        self.memory_: Memory = memory
        self.beta_ = float(beta)
        self.n_features_in_ = int(patterns.dim)
        self._num_atoms = num_atoms

    def _gibbs_weights(self, X: PyTree) -> np.ndarray:
        """Return the Gibbs weights (Q, N) at β."""
        check_is_fitted(self)
        batch = _as_batch(X)
        if batch.dim != self.n_features_in_:
            raise ValueError(
                f"X has {batch.dim} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        queries = self._to_measures(batch, self._num_atoms)
        divergences = _in_batches(partial(pairwise, self.memory_, progress=False), queries)
        weights: np.ndarray = softmax(-self.beta_ * divergences.astype(float), axis=1)
        return weights

    def _to_measures(self, batch: Measure, num_atoms: int) -> AnyMeasure:
        """Return the batch as measures of the kind `measure`.

        Samples are padded to `num_atoms`, or if they have more to a power of two.
        """
        if not isinstance(batch, PointCloud):
            return batch
        cloud: PointCloud = jax.tree.map(np.asarray, batch)  # JAX would compile every shape
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
            num_components = checks.positive_int("num_components", self.num_components)
            max_components = int((cloud.weights > 0).sum(-1).min())
            if num_components > max_components:
                limit = f"at most {max_components}, the number of atoms of one of X"
                raise ValueError(f"num_components must be {limit}; got {num_components}")
            fit = partial(_mixtures, jax.random.key(self.seed), num_components=num_components)
        return jax.tree.map(jax.device_put, _in_batches(fit, cloud))

    def _geometry(self, patterns: AnyMeasure) -> Geometry | None:
        """Return the geometry of the patterns; None for the default of `store`."""
        name = self.geometry
        if name is None and isinstance(patterns, PointCloud):
            name = "Sinkhorn"
        if isinstance(name, str):
            if name not in GEOMETRIES:
                kinds = f"one of {tuple(GEOMETRIES)}, a jdam geometry or None"
                raise ValueError(f"geometry must be {kinds}; got {name!r}")
            epsilon = EPSILON if self.epsilon is None else self.epsilon
            geometry: Geometry = GEOMETRIES[name].relative(patterns, epsilon, rho=self.rho)
            return geometry
        for parameter in ("epsilon", "rho"):
            if getattr(self, parameter) is not None:
                choice = f"geometry={name!r}" if name else "the geometry of Gaussians and mixtures"
                raise ValueError(
                    f"{parameter} must be None with {choice}: it is a parameter of 'Sinkhorn' and "
                    f"'Chamfer' by name; got {getattr(self, parameter)!r}"
                )
        return name


class MemoryClassifier(ClassifierMixin, _MemoryEstimator):  # type: ignore[misc]
    """Classifier of measures by the Gibbs weights of the measures it was fitted to, summed over
    classes.

        P(c | ξ) = Σ_{i: yᵢ = c} wᵢ(ξ),   wᵢ(ξ) ∝ exp(−β D(ξ, Xᵢ)).

    **X** is a list of arrays (nᵢ, d), an array (N, n, d), or a batch of measures of jdam; y
    contains N labels, numbers or strings. Arrays and `jdam.PointCloud`s are samples, which are
    converted to the kind `measure`; other measures are stored unchanged.

    **Arguments** (the same for `MemoryTransformer`):

    - `measure`: "cloud" for the samples themselves, "gaussian" for their mean and covariance,
      "mixture" for a Gaussian mixture of greatest likelihood.
    - `geometry`: "Sinkhorn" or "Chamfer", in units of the patterns as by `Sinkhorn.relative`; or a
      geometry of jdam. None is "Sinkhorn" for clouds, `Bures` for Gaussians and
      `MixtureWasserstein` for mixtures.
    - `beta` > 0, in inverse units of D; None for `jdam.suggest_beta` of the patterns, with their
      classes if there are labels.
    - `epsilon` and `rho`: ε and ρ of a geometry given by name, in units of the patterns, the median
      of ½|x−y|² within them; None for 0.05 and no ρ.
    - `num_components`, `seed`: the number of components of mixtures, and the seed of their fits,
      the same for all.

    **Attributes** after `fit`:

    - `classes_`: the labels, in ascending order.
    - `memory_`: the memory; its values are indices of `classes_`.
    - `beta_`: β.
    - `n_features_in_`: the dimension d.

    **Raises:** `fit` raises `ValueError` or `TypeError` for arguments outside these types and
    ranges, for ε or ρ with a geometry that is not given by name, and as `jdam.store`.
    """

    def fit(self, X: PyTree, y: Any) -> "MemoryClassifier":
        """Store the measures X with their classes y (N,), and choose β."""
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        self._store(X, labels.astype(np.int32))
        self.classes_ = classes
        return self

    def predict_proba(self, X: PyTree) -> np.ndarray:
        """Return the Gibbs weights of each class: (Q, number of classes), rows of sum 1.

        They are the probabilities of the model, and calibrated if β is.
        """
        weights = self._gibbs_weights(X)
        labels = np.asarray(self.memory_.values)
        probabilities: np.ndarray = weights @ (labels[:, None] == np.arange(len(self.classes_)))
        return probabilities

    def predict(self, X: PyTree) -> np.ndarray:
        """Return the class of largest probability for each query, (Q,)."""
        probabilities = self.predict_proba(X)
        classes: np.ndarray = self.classes_[probabilities.argmax(1)]
        return classes


class MemoryTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _MemoryEstimator):  # type: ignore[misc]
    """Transformer of measures to features: their Gibbs weights over the measures it was fitted to.

    X and the arguments are those of `MemoryClassifier`. Labels y are optional; they determine β.

    **Attributes** after `fit`: `memory_`; `beta_`; `n_features_in_`, the dimension d.
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags

    def fit(self, X: PyTree, y: Any = None) -> "MemoryTransformer":
        """Store the measures X, and choose β, from the classes y (N,) if they are given."""
        labels = None if y is None else np.unique(column_or_1d(y), return_inverse=True)[1]
        self._store(X, None if labels is None else labels.astype(np.int32))
        self._n_features_out = len(self.memory_)
        return self

    def transform(self, X: PyTree) -> np.ndarray:
        """Return the Gibbs weights wᵢ(ξ) ∝ exp(−β D(ξ, Xᵢ)): (Q, N), rows of sum 1."""
        return self._gibbs_weights(X)


def _as_batch(X: PyTree) -> Measure:
    """Return X as a batch of measures; arrays become clouds, in JAX's default dtype."""
    if isinstance(X, Measure):
        if len(X.batch_shape) != 1:
            raise ValueError(f"X must have one batch axis; got batch shape {X.batch_shape}")
        return X
    if isinstance(X, list | tuple) and X and isinstance(X[0], Measure):
        stacked: Measure = stack(X)
        return stacked
    if isinstance(X, list | tuple) or (isinstance(X, np.ndarray) and X.dtype.kind == "O"):
        arrays = [_as_floats(f"X[{i}]", array) for i, array in enumerate(X)]
        for i, array in enumerate(arrays):
            if array.ndim != 2:
                raise ValueError(f"X[{i}] must be an array (n, d); got shape {array.shape}")
        clouds: PointCloud = build(unchecked, "cloud", check_ragged("X", "cloud", arrays, None))
        checks.finite("X", clouds.points)
        return clouds
    array = _as_floats("X", X)
    if array.ndim != 3 or 0 in array.shape:
        expected = "a list of arrays (n, d), an array (N, n, d), N, n, d ≥ 1, or measures of jdam"
        raise ValueError(f"X must be {expected}; got shape {array.shape}")
    checks.finite("X", array)
    uniform: Any = uniform_weights(array)
    return unchecked(array, uniform)


def _as_floats(name: str, array: Any) -> Any:
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers; got dtype {array.dtype}")
    return array.astype(jnp.zeros(()).dtype)


def _in_batches(function: Callable[[Any], _T], measures: AnyMeasure) -> _T:
    """Apply a function to batches of the measures, and return the results on the host.

    Batch sizes are powers of two, up to `BATCH_SIZE`; the last batch is padded with copies of the
    last measure.
    """
    num = batch_size(measures)
    width = min(BATCH_SIZE, power_of_two(num))
    host = jax.tree.map(np.asarray, measures)
    results = []
    for start in range(0, num, width):
        rows = np.minimum(np.arange(start, start + width), num - 1)
        result = function(jax.tree.map(lambda leaf, rows=rows: jax.device_put(leaf[rows]), host))
        results.append(jax.tree.map(np.asarray, result))
    joined: _T = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num], *results)
    return joined


def _gaussians(clouds: PointCloud) -> Gaussian:
    return Gaussian.from_samples(clouds.points, clouds.weights)


@partial(jax.jit, static_argnames="num_components")
def _mixtures(key: Array, clouds: PointCloud, *, num_components: int) -> GaussianMixture:
    """Fit a mixture to each cloud, with the same key, so that the fit does not depend on the other
    clouds.
    """

    def one(cloud: PointCloud) -> GaussianMixture:
        weights = cloud.weights
        return GaussianMixture.from_samples(cloud.points, num_components, key=key, weights=weights)

    fitted: GaussianMixture = jax.lax.map(one, clouds, batch_size=FIT_BATCH_SIZE)
    return fitted


def _padded_size(size: int) -> int:
    """Round up to a multiple of an eighth of the next power of two: four sizes for each power of
    two.
    """
    step = max(1, power_of_two(size) // 8)
    return -(-size // step) * step
