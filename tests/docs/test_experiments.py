"""Check the experiments against NumPy, and their results against the page."""

import re
from pathlib import Path

import _experiment as lab
import batch_noise_and_population
import before_training
import feature_scaling
import internal_covariate_shift
import jax
import jax.numpy as jnp
import learning_rate_and_initialization
import loss_landscape
import numpy as np
import pytest
import small_batches
from matplotlib.figure import Figure

import jaxbn

pytestmark = pytest.mark.usefixtures("standard_promotion", "any_rank")
WIDTH, ROWS = 5, 12


@pytest.fixture
def data(rng) -> lab.Digits:
    images = rng.uniform(size=(ROWS, 784)).astype(np.float32)
    return lab.Digits(jnp.asarray(images), jnp.asarray(rng.integers(0, 10, ROWS)))


def some_model(rng, norm, depth=3):
    """Return a model of `init` with noise added to all parameters."""
    params, state = lab.init(jax.random.key(0), norm, depth, WIDTH)

    def shake(a):
        return a + 0.3 * rng.normal(size=a.shape).astype(np.float32)

    return jax.tree.map(shake, params), state


def forward(params, x, norm, skips=False):
    """Return inputs of activations, last activations and logits, in float64."""
    x, inputs = np.asarray(x, np.float64), []
    (kernel, affine), (kernels, affines), head = jax.tree.map(np.float64, params)
    layers = [(kernel, affine)]
    for i, kernel in enumerate(kernels):
        layers.append((kernel, jax.tree.map(lambda a, i=i: a[i], affines)))
    for kernel, (scale, bias) in layers:
        z = x @ kernel
        if norm:
            z = scale * (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
        inputs.append(z + bias)
        x = np.maximum(inputs[-1], 0) + (x if skips and len(inputs) > 1 else 0)
    return inputs, x, x @ head


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_network_matches_numpy(rng, data, norm, skips):
    params, state = some_model(rng, norm)
    logits, _, inputs = lab.network(params, state, data.images, True, skips=skips)
    expected, _, expected_logits = forward(params, data.images, norm, skips)
    np.testing.assert_allclose(inputs, expected, atol=1e-4)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4)


def test_network_adds_noise_in_every_layer(rng, data):
    params, state = some_model(rng, norm=True)
    noise = jnp.asarray(rng.normal(size=(3, ROWS, WIDTH)), jnp.float32)
    *_, inputs = lab.network(params, state, data.images, True, noise=noise)
    *_, clean = lab.network(params, state, data.images, True)
    np.testing.assert_allclose(inputs[0], clean[0] + noise[0], atol=1e-5)
    affine = params[1][1]
    unnoised = inputs[1:] - noise[1:]
    np.testing.assert_allclose(unnoised.mean(1), affine.bias, atol=1e-4)


def test_init_draws_weights_of_the_given_deviation():
    key = jax.random.key(0)
    (kernel, _), (kernels, _), _ = lab.init(key, True, depth=4)[0]
    np.testing.assert_allclose(kernel.std(), (2 / 784) ** 0.5, rtol=0.02)
    np.testing.assert_allclose(kernels.std(), (2 / 100) ** 0.5, rtol=0.02)
    (kernel, _), *_ = lab.init(key, True, depth=4, std=lambda n_in: n_in / 1000)[0]
    np.testing.assert_allclose(kernel.std(), 0.784, rtol=0.02)


@pytest.mark.parametrize("norm", [False, True])
def test_sgd_step_matches_closed_form(rng, data, norm):
    """The head's gradient is hᵀ(softmax - one hot) / rows; z updates the state."""
    model, rate = some_model(rng, norm), 0.3
    rows = np.array([[0, 3, 4, 7, 9, 11]])
    (params, state), losses = lab.sgd(model, data, jnp.asarray(rows), rate)
    inputs, h, logits = forward(model[0], data.images[rows[0]], norm)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right = np.eye(10)[np.asarray(data.labels)[rows[0]]]
    expected = np.float64(model[0][2]) - rate * h.T @ (shares - right) / 6
    np.testing.assert_allclose(params[2], expected, atol=1e-4)
    np.testing.assert_allclose(
        losses, -np.log((shares * right).sum(1)).mean(), rtol=1e-4
    )
    if norm:
        z = np.asarray(data.images)[rows[0]] @ np.asarray(model[0][0][0])
        np.testing.assert_allclose(state[0].mean, 0.1 * z.mean(0), atol=1e-5)
    assert len(inputs) == 3


def test_fit_observes_sgd_every_few_steps(rng, data):
    models = lab.inits(2, True, 2, WIDTH)
    rows = np.stack([lab.draw_rows(seed, 6, 4, ROWS) for seed in range(2)])
    rates = np.array([0.1, 0.2])

    def observe(models, losses):
        return models[0][2], losses

    heads, losses = lab.fit(models, data, rows, rates, observe, every=2)
    assert heads.shape == (2, 3, WIDTH, 10)
    for run, rate in enumerate(rates):
        model = jax.tree.map(lambda a, run=run: a[run], models)
        (params, _), expected = lab.sgd(model, data, jnp.asarray(rows[run]), rate)
        np.testing.assert_allclose(heads[run, -1], params[2], atol=1e-5)
        np.testing.assert_allclose(losses[run].ravel(), expected, atol=1e-5)


def test_accuracy_uses_running_statistics(rng, data):
    params, state = some_model(rng, norm=True)
    _, state, _ = lab.network(params, state, data.images, True, momentum=0.0)
    logits, *_ = lab.network(params, state, data.images[:1], False)
    first = lab.Digits(data.images[:1], logits.argmax(-1))
    assert lab.accuracy((params, state), first) == 1


def test_draw_rows_has_each_row_once_per_epoch():
    rows = lab.draw_rows(seed=0, steps=7, batch=4, population=13)
    assert rows.shape == (7, 4)
    for epoch in (rows[:3], rows[3:6]):
        assert len(np.unique(epoch)) == 12
    assert (rows[:3] != rows[3:6]).any()


@pytest.mark.parametrize(
    ("findings", "word"),
    [((True, True), "held here"), ((True, False), "held in part"), ((0, 0), "did not")],
)
def test_verdict_follows_findings(findings, word):
    line, answers = lab.verdict("x is y.", dict(zip(("a", "b"), findings, strict=True)))
    assert f"x is y. It {word}" in line
    assert [answer[:3] == "yes" for answer in answers] == [*map(bool, findings)]


@pytest.mark.parametrize(
    ("without", "shown"), [([1.0, 2.0], "1.5"), ([1.0, np.inf], "not reached")]
)
def test_versus_is_a_sentence(without, shown):
    expected = f"the rate was 3.0 with batch norm, versus {shown} without."
    assert lab.versus("Rate", without, [3.0], ".1f") == expected


def test_report_writes_files_and_prints_verdict(tmp_path, capsys):
    args = lab.Arguments(quick=False, full=False, output=tmp_path / "new")
    claim = "x is y.", {"found 3": True}
    lab.report(args, "some", Figure(), [["a", "b"], ["1", "2"]], claim)
    expected = "Claim: x is y. It held here."
    assert capsys.readouterr().out.endswith(f"\n{expected}\n- yes: found 3\n")
    assert (tmp_path / "new" / "some.png").stat().st_size > 0
    text = (tmp_path / "new" / "some.md").read_text()
    table = "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert text == f"{table}\n**{expected}**\n\n- yes: found 3\n"


def test_quick_report_has_no_verdict(tmp_path, capsys):
    args = lab.Arguments(quick=True, full=False, output=tmp_path)
    findings = {"found 3": True, "found 4": False}
    lab.report(args, "some", Figure(), [["a"]], ("x is y.", findings))
    out, file = capsys.readouterr().out, (tmp_path / "some.md").read_text()
    first, *rest = out.splitlines()[-3:]
    assert first.startswith("Too short to say: ")
    assert rest == ["- found 3", "- found 4"]
    for shown in (out, file):
        assert "Too short" in shown
        for word in ("held", "did not hold", "yes", "no:"):
            assert word not in shown


def test_report_wraps_long_lines(tmp_path, capsys):
    args = lab.Arguments(quick=False, full=False, output=tmp_path)
    finding = "a finding of -0.50, " * 10
    lab.report(args, "some", Figure(), [["a"]], ("x is y.", {finding: True}))
    *_, first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("- yes: a finding")
    assert max(map(len, (first, second, last))) <= 88
    assert second.startswith("  ")


@pytest.mark.parametrize("norm", [False, True])
def test_feature_scaling_minimum_is_least_squares(rng, norm):
    x = (rng.normal(size=(50, 2)) * [5, 0.2] + 3).astype(np.float32)
    target = rng.normal(size=50).astype(np.float32)
    best, curvature = feature_scaling.minimum((x, target), norm)
    x = x - x.mean(0, dtype=np.float64)
    x = x / np.sqrt(x.var(0) + 1e-5) if norm else x
    expected, *_ = np.linalg.lstsq(x, target - target.mean(), rcond=None)
    np.testing.assert_allclose(best, expected, rtol=1e-3)
    np.testing.assert_allclose(curvature, x.T @ x / 50, rtol=1e-3, atol=1e-4)


def test_feature_scaling_descent_matches_quadratic(rng):
    """w_t - w* = (1 - rate · curvature)^t (w_0 - w*)."""
    x = rng.normal(size=(50, 2)).astype(np.float32)
    data = x, rng.normal(size=50).astype(np.float32)
    best, curvature = (np.float64(a) for a in feature_scaling.minimum(data, False))
    path = feature_scaling.descend(0.3, data, False, steps=4)
    factor = np.linalg.matrix_power(np.eye(2) - 0.3 * curvature, 4)
    np.testing.assert_allclose(path[-1], best - factor @ best, atol=1e-5)
    left = feature_scaling.remaining(jnp.stack([path[0], best]), data, False)
    np.testing.assert_allclose(left, [1, 0], atol=1e-5)


def test_feature_scaling_features_of_known_images():
    image = np.zeros((28, 28))
    image[5:9, 10:13] = image[19:23, 15:18] = 1  # the second is the first turned
    upper = np.where(np.arange(28)[:, None] < 14, image, 0)
    found = feature_scaling.features(np.stack([image, upper]).reshape(2, 784))
    np.testing.assert_allclose(found[0], [6, 1], atol=1e-6)
    assert found[1, 0] == 3
    assert found[1, 1] < 0


@pytest.mark.parametrize("rate", [0.4, 0.8, 1.1])
def test_covariate_shift_layers_double_the_step(rng, rate):
    """The error is (1 - 2·rate)^t, or (1 - rate)^t with batch norm between them."""
    x = rng.normal(size=(100, 1)).astype(np.float32)
    x = (x - x.mean()) / x.std()
    for norm, factor in ((False, 1 - 2 * rate), (True, 1 - rate)):
        way = internal_covariate_shift.shifts(rate, jnp.asarray(x), norm)
        np.testing.assert_allclose(way, 1 - factor ** np.arange(12), atol=1e-3)


def test_covariate_shift_fate_classifies_paths():
    fate = internal_covariate_shift.fate
    assert fate(jnp.array([0, 0.5, 0.9])) == "straight"
    assert fate(jnp.array([0, 1.5, 0.9])) == "zigzags"
    assert fate(jnp.array([0, 2.2, -4.0])) == "diverges"


def test_reached_returns_first_point_or_infinity():
    curves = np.array([[0.1, 0.6, 0.5], [0.1, 0.2, 0.3]])
    np.testing.assert_array_equal(lab.reached(curves, 0.5), [2, np.inf])
    assert lab.spread(lab.reached(curves, 0.5)) == "reached by 1 of 2"


def test_covariate_shift_drift_is_relative_to_percentile_range():
    percentiles = np.array([[[-1, 0, 1], [0, 3, 4]]], float)[
        ..., None
    ]  # 1 run, 2 times
    np.testing.assert_allclose(internal_covariate_shift.drift(percentiles), 3 / 4)


def test_bisect_brackets_limit_per_seed():
    limits = np.array([0.02, 0.5, 31.0])
    found = learning_rate_and_initialization.bisect(lambda r: r < limits, 3, halvings=6)
    assert (found < limits).all()
    assert (limits <= found * 10 ** (4 / 2**6) * (1 + 1e-9)).all()


def test_best_rate_has_highest_mean_over_seeds():
    scores = np.array([[0.1, 0.9], [0.6, 0.6], [0.5, 0.5]])
    assert learning_rate_and_initialization.best(scores) == 1


def test_before_training_measures_match_numpy(rng, data):
    models = lab.inits(2, False, before_training.DEPTH)
    mean2, var, norms, gradients = before_training.at_start(models, data, False)
    params = jax.tree.map(lambda a: a[1], models[0])
    z = np.stack(forward(params, data.images, norm=False)[0])
    np.testing.assert_allclose(mean2[1], (z.mean(1) ** 2).mean(-1), rtol=1e-3)
    np.testing.assert_allclose(var[1], z.var(1).mean(-1), rtol=1e-3)
    middle = before_training.DEPTH // 2 - 1
    np.testing.assert_allclose(
        norms[1, middle] ** 2, (gradients[1] ** 2).sum(), rtol=1e-4
    )


def test_before_training_ratios_of_known_arrays():
    layers = np.array([[2.0, 4.0, 16.0]])
    assert before_training.growth(layers) == 8
    assert before_training.explosion(layers) == 1 / 8
    assert before_training.tail(np.array([[0.0, 1.0, 2.0, 10.0]])) == 5


def test_loss_landscape_probe_follows_gradient(rng, data):
    """Loss at x - t·rate·g, changes of the gradient, and the steepest change."""
    model, rate = some_model(rng, norm=True), 0.1
    gradient, loss = jax.jit(jax.grad(lab.loss, has_aux=True)), jax.jit(lab.loss)
    g, _ = gradient(*model, data)
    found = loss_landscape.probe(model, g, data, rate)
    size, changes = jnp.linalg.norm(flat(g)), []
    for length, cost in zip(loss_landscape.LENGTHS, found["losses"], strict=True):
        y = jax.tree.map(lambda p, d, t=length: p - t * rate * d, model[0], g)
        np.testing.assert_allclose(loss(y, model[1], data)[0], cost, rtol=1e-4)
        changes.append(jnp.linalg.norm(flat(gradient(y, model[1], data)[0]) - flat(g)))
    np.testing.assert_allclose(found["changes"], changes, rtol=1e-3)
    np.testing.assert_allclose(found["predictiveness"], max(changes), rtol=1e-3)
    slopes = np.array(changes) / (np.array(loss_landscape.LENGTHS) * rate * size)
    np.testing.assert_allclose(found["smoothness"], slopes.max(), rtol=1e-3)


def flat(tree):
    return jnp.concatenate([a.ravel() for a in jax.tree.leaves(tree)])


def test_loss_landscape_noise_differs_by_unit_and_step():
    key, draw = jax.random.key(0), loss_landscape.draw_noise
    noise = np.asarray(draw(key, 0))
    means, deviations = noise.mean(1), noise.std(1)
    assert means.std() > 0.2  # U(-1/2, 1/2) has 0.29
    assert abs(means).max() < 0.5 + 0.25
    np.testing.assert_allclose(deviations.mean(), 0.25, atol=0.02)
    assert abs(means - np.asarray(draw(key, 1)).mean(1)).mean() > 0.2


def test_loss_landscape_shift_is_in_standard_deviations(rng, data):
    model = lab.init(jax.random.key(0), True, loss_landscape.DEPTH)
    shape = (loss_landscape.DEPTH, ROWS, 100)
    calm, moved = jnp.zeros(shape), jnp.ones(shape)
    found = loss_landscape.shift(data.images, (model, calm), (model, moved))
    # Batch norm gives std 1, and removes the shift of the layers before it.
    middle = lab.network(*model, data.images, True, noise=calm)[2][shape[0] // 2]
    alive = np.asarray(middle.std(0)) > 0.5
    assert alive.mean() > 0.9
    np.testing.assert_allclose(found["shift of means"], 1, rtol=0.2)


def test_batch_noise_errors_of_scaled_statistics(rng):
    shapes = (3,), (4, 3)
    mean, var = ([jnp.asarray(rng.uniform(1, 2, s)) for s in shapes] for _ in "mv")
    counts = [jnp.zeros(s[:-1]) for s in shapes]
    true = [jaxbn.BatchNormState(*of) for of in zip(mean, var, counts, strict=True)]
    some = jax.tree.map(lambda a: a * 1.1, true)
    mean, var = batch_noise_and_population.errors(tuple(some), tuple(true))
    shares = [0.1 * s.mean / s.var**0.5 for s in true]
    expected = np.concatenate([shares[0][None], shares[1]]).mean()
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    np.testing.assert_allclose(var, np.log(1.1), rtol=1e-5)


def test_batch_noise_matches_numpy(rng, data):
    """The noise of the first layer's mean; without sampling there is none."""
    model = some_model(rng, norm=True)
    rows = rng.integers(ROWS, size=(50, 4))
    found = batch_noise_and_population.noise(model, data, data.images[0], rows)
    z = np.asarray(data.images, np.float64) @ np.asarray(model[0][0][0])
    expected = (z[rows].mean(1).std(0) / z.std(0)).mean()
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
    whole = np.stack([rng.permutation(ROWS) for _ in range(3)])
    found = batch_noise_and_population.noise(model, data, data.images[0], whole)
    np.testing.assert_allclose(found[0], 0, atol=1e-4)
    np.testing.assert_allclose(found[4], 1, rtol=1e-4)


@pytest.mark.parametrize("axis_name", [None, "groups"])
def test_small_batches_step_uses_mean_gradient(rng, data, axis_name):
    """The second loss follows a step along the gradient of the mean over groups."""
    model = some_model(rng, norm=True)
    rows = np.stack([rng.permutation(ROWS).reshape(3, 4) for _ in range(2)])
    found = small_batches.fit((data, data), model, jnp.asarray(rows), axis_name)

    @jax.jit
    def mean_loss(params, rows):
        groups = rows.reshape(1, ROWS) if axis_name else rows
        batches = [lab.Digits(data.images[g], data.labels[g]) for g in groups]
        costs = [lab.loss(params, model[1], batch)[0] for batch in batches]
        return sum(costs, start=jnp.zeros(())) / len(groups)

    grads = jax.grad(mean_loss)(model[0], rows[0])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, model[0], grads)
    np.testing.assert_allclose(found[-2], mean_loss(params, rows[1]), rtol=1e-4)
    expected = [mean_loss(model[0], rows[0]), found[-2]]
    np.testing.assert_allclose(found[-1], np.mean(expected), rtol=1e-4)


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "why_batch_norm.md").read_text()
PATHS = sorted((ROOT / "examples" / "experiments").glob("[!_]*.py"))
SCRIPTS = {path.stem: path.read_text() for path in PATHS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_page_includes_each_experiment(name):
    assert f"    python examples/experiments/{name}.py\n" in PAGE
    assert f"](experiments/{name}.png)" in PAGE
    assert f'--8<-- "{name}.md"' in PAGE
    assert (ROOT / "docs" / "experiments" / f"{name}.png").exists()
    assert "\n**Claim: " in written(name)
    assert len(SCRIPTS[name].splitlines()) < 170


def written(name):
    return (ROOT / "docs" / "experiments" / f"{name}.md").read_text()


def test_page_summary_matches_experiments():
    sections = re.split(r"^## (?=\d\. )", PAGE, flags=re.MULTILINE)[1:]
    results = {
        section[0]: "".join(map(written, re.findall(r'--8<-- "(\w+)\.md"', section)))
        for section in sections
    }
    rows = re.findall(r"^\| (.+) \| (.+) \| (\[.+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 17
    for claim, found, links in rows:
        text = "".join(results[number] for number in re.findall(r"\[(\d)\]", links))
        for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?%?", found):
            stated = rf"(?<![\d.]){re.escape(number)}(?!\d|\.\d)"
            assert re.search(stated, text), (claim, number)


def test_percent_has_one_spelling():
    for text in (PAGE, *SCRIPTS.values(), *map(written, SCRIPTS)):
        assert not re.search(r"\d %", text)


def test_each_quotation_has_a_source():
    """A quotation is a paragraph of lines with ">"; its last line names the source."""
    for quotation in re.findall(r"(?:^>.*\n)+", PAGE, re.MULTILINE):
        assert "https://" in quotation, quotation
