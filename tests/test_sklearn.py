"""Estimators by scikit-learn's own checks, against the memory they are made of."""

import logging
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import LinearSVC
from sklearn.utils import estimator_checks as checks
from sklearn.utils import get_tags

import jdam
import jdam.sklearn
from jdam._core.batching import power_of_two
from jdam.sklearn import MemoryClassifier, MemoryTransformer, _padded_size
from tests.cases import only_full


def shapes(rng, num=24):
    """Clouds of different numbers of points, half of them wide, half of them tall."""
    wide = np.arange(num) % 2 == 0
    spread = np.where(wide[:, None], [1.0, 0.3], [0.3, 1.0])
    sizes = rng.integers(6, 9, size=num)
    clouds = [rng.normal(size=(n, 2)) * s for n, s in zip(sizes, spread, strict=True)]
    return clouds, np.where(wide, "wide", "tall")


def dirac(X):
    return np.asarray(X)[:, None] if np.ndim(X) == 2 else X


class OfRows(MemoryClassifier):
    """Each row of a table as a cloud of one atom, for checks that have tables only."""

    def _store(self, X, labels):
        checks_rows(X)
        super()._store(dirac(X), labels)

    def _gibbs_weights(self, X):
        if hasattr(self, "memory_"):
            checks_rows(X)
        return super()._gibbs_weights(dirac(X))


def checks_rows(X):
    if np.ndim(X) == 1:
        raise ValueError("Reshape your data")


ESTIMATORS = [MemoryClassifier, MemoryTransformer]


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize(
    "check",
    [
        checks.check_estimator_cloneable,
        checks.check_estimator_tags_renamed,
        checks.check_valid_tag_types,
        checks.check_estimator_repr,
        checks.check_no_attributes_set_in_init,
        checks.check_do_not_raise_errors_in_init_or_set_params,
        checks.check_mixin_order,
        checks.check_parameters_default_constructible,
        checks.check_get_params_invariance,
        checks.check_set_params,
    ],
)
def test_checks_of_scikit_learn_without_data(kind, check):
    check(kind.__name__, kind(geometry="Chamfer"))


@pytest.mark.full
@pytest.mark.parametrize(
    "check",
    [
        checks.check_fit_score_takes_y,
        checks.check_estimators_overwrite_params,
        checks.check_dont_overwrite_parameters,
        checks.check_estimators_fit_returns_self,
        checks.check_readonly_memmap_input,
        checks.check_estimators_unfitted,
        checks.check_n_features_in_after_fitting,
        checks.check_n_features_in,
        checks.check_estimators_dtypes,
        checks.check_dict_unchanged,
        checks.check_fit_idempotent,
        checks.check_fit_check_is_fitted,
        checks.check_methods_sample_order_invariance,
        checks.check_methods_subset_invariance,
        checks.check_pipeline_consistency,
        checks.check_estimators_nan_inf,
        checks.check_estimators_pickle,
        checks.check_f_contiguous_array_estimator,
        checks.check_classifiers_one_label,
        checks.check_classifiers_classes,
        checks.check_classifiers_regression_target,
        checks.check_supervised_y_2d,
        checks.check_requires_y_none,
        checks.check_decision_proba_consistency,
    ],
)
@pytest.mark.filterwarnings("ignore")  # of scikit-learn's own data
def test_checks_of_scikit_learn_with_data(check):
    check("OfRows", OfRows(geometry=jdam.Chamfer(0.1)))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_tags(kind):
    tags = get_tags(kind())
    assert tags.input_tags.three_d_array
    assert not tags.input_tags.two_d_array
    assert (tags.classifier_tags is None) == (kind is MemoryTransformer)
    assert (tags.transformer_tags is None) == (kind is MemoryClassifier)
    assert tags.target_tags.required == (kind is MemoryClassifier)


KINDS = [
    {"geometry": "Chamfer", "rho": 1.0},
    *only_full(
        {}, {"measure": "gaussian"}, {"measure": "mixture", "num_components": 2}, {"beta": 3.0}
    ),
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_probabilities_are_gibbs_weights_by_class(rng, settings):
    X, y = shapes(rng)
    model = MemoryClassifier(**settings).fit(X[:16], y[:16])
    assert list(model.classes_) == ["tall", "wide"]
    assert (model.predict(X[16:]) == y[16:]).mean() >= 0.75
    assert model.score(X[:16], y[:16]) == 1
    found = model.predict_proba(X[16:])
    ragged = jdam.PointCloud.from_ragged(X[16:])
    if settings.get("measure") == "gaussian":
        ragged = jdam.Gaussian.from_samples(ragged.points, ragged.weights)
    if settings.get("measure") != "mixture":
        for i in (0, 5):
            weights = jdam.gibbs_weights(model.memory_, ragged[i], model.beta_)
            wide = np.asarray(weights)[y[:16] == "wide"].sum()
            np.testing.assert_allclose(found[i], [1 - wide, wide], atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1)
    if "beta" in settings:
        assert model.beta_ == 3
    # An entry does not depend on those beside it.
    np.testing.assert_allclose(model.predict_proba(X[17:19]), found[1:3], atol=1e-7)


def test_geometries(rng):
    X, _ = shapes(rng, 6)
    clouds = jdam.PointCloud.from_ragged(X)
    found = MemoryClassifier(epsilon=0.1, rho=0.2)._geometry(clouds)
    wanted = jdam.Sinkhorn.relative(clouds, 0.1, rho=0.2)
    assert isinstance(found, jdam.Sinkhorn)
    assert float(found.epsilon) == float(wanted.epsilon)
    assert float(found.rho) == float(wanted.rho)
    found = MemoryClassifier(geometry="Chamfer")._geometry(clouds)
    assert isinstance(found, jdam.Chamfer)
    assert found.rho is None
    own = jdam.Chamfer(0.3)
    assert MemoryClassifier(geometry=own)._geometry(clouds) is own
    assert clone(MemoryClassifier(geometry=own)).geometry.epsilon == own.epsilon
    assert MemoryClassifier(measure="gaussian")._geometry(clouds.mean) is None


def test_what_is_stored(rng):
    X, _ = shapes(rng, 6)
    ragged = jdam.PointCloud.from_ragged(X)
    make = MemoryClassifier()._to_measures
    for same in (X, np.array([*X, None], object)[:6], ragged, [ragged[i] for i in range(6)]):
        cloud = make(jdam.sklearn._as_batch(same), 8)
        assert cloud.num_atoms == 8
        for i in range(6):
            on = np.asarray(cloud.weights[i]) > 0
            np.testing.assert_allclose(cloud.points[i][on], X[i])
    gaussians = MemoryClassifier("gaussian")._to_measures(ragged, 8)
    np.testing.assert_allclose(gaussians.covariance[4], np.cov(X[4].T, bias=True), atol=1e-12)
    assert MemoryClassifier()._to_measures(gaussians, 0) is gaussians
    whole = jdam.sklearn._as_batch(np.arange(12).reshape(2, 3, 2))
    assert whole.points.dtype == "float64"


def test_sizes_are_few():
    sizes = range(1, 1000)
    assert all(n <= _padded_size(n) <= 1.25 * n for n in sizes if n > 3)
    assert all(n <= power_of_two(n) < 2 * n for n in sizes)
    assert len({_padded_size(n) for n in sizes}) < 40


def test_later_calls_and_other_parameters_compile_nothing(rng, caplog):
    X, y = shapes(rng)
    model = MemoryClassifier(geometry="Chamfer", beta=2.0, rho=0.1).fit(X[:12], y[:12])
    model.predict(X[12:17])
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        model.predict(X[12:20])
        model.predict([x[:5] for x in X[17:23]])
        model.set_params(beta=5.0, epsilon=0.1, rho=0.2).fit(X[12:], y[12:]).predict(X[:6])
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert compiled == []


@pytest.mark.full
def test_selection(rng):
    """Folds, a grid over β, ε and ρ, and a pipeline."""
    X, y = shapes(rng)
    model = MemoryClassifier(geometry="Chamfer")
    assert cross_val_score(model, X, y, cv=3).mean() > 0.7
    tensor = np.stack([x[:6] for x in X])
    assert cross_val_score(model, tensor, y, cv=3).mean() > 0.7
    grid = {"beta": [1e-3, 30.0], "epsilon": [0.02, 0.05], "rho": [None, 0.5]}
    found = GridSearchCV(model, grid, cv=2).fit(X, y)
    assert found.best_score_ > 0.7
    assert len(found.cv_results_["params"]) == 8
    centre = FunctionTransformer(lambda X: [x - x.mean(0) for x in X])
    features = MemoryTransformer(geometry="Chamfer")
    line = make_pipeline(centre, features, LinearSVC())
    assert line.fit(X[:16], y[:16]).score(X[16:], y[16:]) > 0.7
    measures = jdam.PointCloud.from_ragged(X)
    assert cross_val_score(model, measures, y, cv=2).mean() > 0.7


def test_features(rng):
    X, y = shapes(rng)
    model = MemoryTransformer(geometry="Chamfer", beta=1.5)
    features = model.fit_transform(X[:12])
    assert features.shape == (12, 12)
    np.testing.assert_allclose(features.sum(1), 1)
    ragged = jdam.PointCloud.from_ragged(X[:12])
    wanted = jdam.gibbs_weights(model.memory_, ragged[3], 1.5)
    np.testing.assert_allclose(features[3], wanted, atol=1e-7)
    assert list(model.get_feature_names_out())[:2] == ["memorytransformer0", "memorytransformer1"]
    same = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(same.transform(X[12:]), model.transform(X[12:]))
    with pytest.raises(NotFittedError):
        clone(model).transform(X)
    assert model.fit(X[:12], y[:12]) is model


MISTAKES = [
    ({"measure": "clouds"}, ValueError, "measure must be one of"),
    ({"geometry": "Bures"}, ValueError, r"geometry must be one of \('Sinkhorn', 'Chamfer'\)"),
    ({"geometry": jdam.Chamfer(0.1), "epsilon": 0.1}, ValueError, "epsilon must be None with geo"),
    ({"measure": "gaussian", "rho": 0.1}, ValueError, "rho must be None with the geometry of Gau"),
    ({"measure": "mixture", "num_components": 9}, ValueError, "num_components must be at most 6"),
    ({"geometry": jdam.Chamfer(0.1), "beta": -1.0}, ValueError, "beta must be finite and > 0"),
]


@pytest.mark.parametrize(("settings", "error", "message"), MISTAKES)
def test_mistakes_are_named(rng, settings, error, message):
    X = [rng.normal(size=(6, 2)) for _ in range(4)]
    with pytest.raises(error, match=message):
        MemoryClassifier(**settings).fit(X, [0, 0, 1, 1])


def test_wrong_data_is_named(rng):
    X, y = shapes(rng, 4)
    model = MemoryClassifier(geometry=jdam.Chamfer(0.1), beta=1.0)
    for wrong, message in (
        (np.ones((4, 2)), r"X must be a list of arrays \(n, d\).*; got shape \(4, 2\)"),
        ([*X[:3], np.ones(2)], r"X\[3\] must be an array \(n, d\); got shape \(2,\)"),
        (jdam.PointCloud(X[0]), "X must have one batch axis"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(wrong, y)
    with pytest.raises(TypeError, match=r"X\[0\] must hold real numbers; got dtype <U1"):
        model.fit([np.array([["a"]])], y)
    with pytest.raises(ValueError, match="y must have a label for each of X; .* 3 and 4"):
        model.fit(X, y[:3])
    with pytest.raises(ValueError, match="requires y to be passed"):
        model.fit(X, None)
    with pytest.raises(NotFittedError):
        model.predict(X)
    with pytest.raises(ValueError, match="X has 3 features, but MemoryClassifier is expecting 2"):
        model.fit(X, y).predict(np.ones((1, 4, 3)))


def test_importing_jdam_does_not_import_scikit_learn():
    code = "import sys, jdam; assert 'sklearn' not in sys.modules and 'jdam.sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
