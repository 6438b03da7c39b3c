"""Check the example of reinforcement learning against NumPy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen

pytest.importorskip("gymnasium")
import _pendulum as pendulum
import crossq

pytestmark = pytest.mark.usefixtures("standard_promotion", "any_rank")
BATCH = 6
NORM = partial(jaxbn.linen.BatchNorm, momentum=0.0)  # keeps only the last statistics
make_agent = cache(crossq.make_agent)
joint_pass, sample_action = map(jax.jit, (crossq.joint_pass, crossq.sample_action))
update_critic, update_actor = map(jax.jit, (crossq.update_critic, crossq.update_actor))


def some_agent(rng, norm):
    """Return an agent with noise added to the parameters of its critics."""
    agent = make_agent(norm, 0)

    def shake(a):
        return np.asarray(a) + 0.1 * rng.normal(size=a.shape).astype(np.float32)

    critic = agent.critic.replace(params=jax.tree.map(shake, agent.critic.params))
    return agent._replace(critic=critic)


@pytest.fixture
def batch(rng):
    shapes = (BATCH, 3), (BATCH, 1), (BATCH,), (BATCH, 3), (BATCH,)
    fields = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    return pendulum.Transition(*fields)._replace(terminated=jnp.arange(BATCH) % 2)


def q_values(params, x):
    """Return Q by both critics in float64, normalized by the statistics of `x`."""
    params = jax.tree.map(np.float64, params)
    q = []
    for critic in range(2):
        h = x
        for layer in range(3):
            norm, dense = params[f"BatchNorm_{layer}"], params[f"Dense_{layer}"]
            h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
            h = h * norm["scale"][critic] + norm["bias"][critic]
            h = h @ dense["kernel"][critic] + dense["bias"][critic]
            h = np.maximum(h, 0) if layer < 2 else h
        q.append(h[:, 0])
    return np.stack(q)


def test_joint_pass_matches_numpy(rng, batch):
    critic = some_agent(rng, NORM).critic
    next_action = rng.normal(size=(BATCH, 1)).astype(np.float32)
    q, next_q, _ = joint_pass(critic, critic.params, batch, next_action)
    first = np.concatenate([batch.obs, batch.action], 1)
    second = np.concatenate([batch.next_obs, next_action], 1)
    x = np.concatenate([first, second]).astype(np.float64)
    expected = q_values(critic.params, x)
    np.testing.assert_allclose(q, expected[:, :BATCH], atol=1e-4)
    np.testing.assert_allclose(next_q, expected[:, BATCH:], atol=1e-4)


def test_joint_pass_equals_separate_passes_with_its_statistics(rng, batch):
    """Separate batches have other statistics, and so other values."""
    critic = some_agent(rng, NORM).critic
    joint = joint_pass(critic, critic.params, batch, batch.action)
    for q, obs in zip(joint[:2], (batch.obs, batch.next_obs), strict=True):
        alone = run(critic.replace(**joint[2]), obs, batch.action, train=False)
        np.testing.assert_allclose(q, alone, atol=1e-4)
        own, _ = run(critic, obs, batch.action, train=True)
        assert np.abs(q - own).max() > 1e-2


@partial(jax.jit, static_argnames="train")
def run(critic, obs, action, train):
    mutable = "batch_stats" if train else False
    return critic(critic.params, obs, action, train, mutable=mutable)


def test_critic_moves_towards_soft_bellman_target(rng, batch):
    """Adam's first step has the sign of the gradient; the last bias gets 2 Σ errors."""
    agent = some_agent(rng, NORM)
    noise = jnp.asarray(rng.normal(size=(BATCH, 1)), jnp.float32)
    actor, critic, temperature = agent
    next_obs = batch.next_obs
    next_action, log_prob = sample_action(actor, actor.params, next_obs, noise)
    q, next_q, new = joint_pass(critic, critic.params, batch, next_action)
    alpha = np.exp(temperature.params["log"])
    value = np.min(next_q, axis=0) - alpha * log_prob
    target = batch.reward + 0.99 * np.where(batch.terminated, 0, value)
    moved = update_critic(agent, batch, noise).critic
    bias, before = (s.params["Dense_2"]["bias"][:, 0] for s in (moved, critic))
    np.testing.assert_array_equal(np.sign(bias - before), np.sign((target - q).mean(1)))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, moved.batch_stats, new["batch_stats"])


def test_actor_learns_from_running_statistics(rng, batch):
    agent = some_agent(rng, NORM)
    noise = jnp.asarray(rng.normal(size=(BATCH, 1)), jnp.float32)
    stats = jax.tree.map(
        lambda a: np.sqrt(1 + np.arange(a.size)).reshape(a.shape),
        agent.critic.batch_stats,
    )
    other = agent._replace(critic=agent.critic.replace(batch_stats=stats))
    first, second = (update_actor(a, batch.obs, noise) for a in (agent, other))
    jax.tree.map(np.testing.assert_array_equal, first.critic, agent.critic)
    kernels = (a.actor.params["Dense_2"]["kernel"] for a in (first, second))
    assert (next(kernels) != next(kernels)).any()
    _, log_prob = sample_action(agent.actor, agent.actor.params, batch.obs, noise)
    rises = first.temperature.params["log"] > agent.temperature.params["log"]
    assert rises == (-log_prob.mean() < crossq.TARGET_ENTROPY)


def test_initial_weights_do_not_depend_on_normalization():
    plain, normalized = (make_agent(norm, 0).critic.params for norm in (None, NORM))
    for name, layer in plain.items():
        np.testing.assert_array_equal(layer["kernel"], normalized[name]["kernel"])
        first, second = layer["kernel"]
        assert (first != second).any()


def test_log_prob_matches_change_of_variables(rng):
    u, mean, log_std = rng.normal(size=(3, 50, 2))
    u[0] = 8.0, -8.0
    gaussian = -((u - mean) ** 2) / (2 * np.exp(2 * log_std)) - log_std
    density = gaussian - np.log(2 * np.pi) / 2 - np.log(1 - np.tanh(u) ** 2)
    found = crossq.log_prob(*(jnp.asarray(a, jnp.float32) for a in (u, mean, log_std)))
    np.testing.assert_allclose(found, density.sum(-1), rtol=1e-4)


def test_sample_action_is_tanh_of_scaled_noise(rng, batch):
    actor = make_agent(None, 0).actor
    mean, log_std = actor(actor.params, batch.obs)
    noise = rng.normal(size=(BATCH, 1)).astype(np.float32)
    action, _ = sample_action(actor, actor.params, batch.obs, noise)
    expected = np.tanh(mean + np.exp(log_std) * noise)
    np.testing.assert_allclose(action, expected, rtol=1e-5)


def test_replay_buffer_keeps_the_last_transitions_of_each_run(rng):
    buffer = pendulum.ReplayBuffer(capacity=4, runs=2, rng=rng)
    runs = np.array([0.0, 100.0])
    for step in range(6):
        values = runs + step
        obs = np.repeat(values[:, None], 3, axis=1)
        buffer.add(obs, values[:, None], values, obs + 1, np.zeros(2))
    sample = buffer.sample(batches=3, size=50)
    assert sample.obs.shape == (3, 2, 50, 3)
    for run, offset in enumerate(runs):
        seen = np.unique(sample.reward[:, run])
        np.testing.assert_array_equal(seen, offset + np.arange(2, 6))
    np.testing.assert_array_equal(sample.obs[..., 0], sample.reward)
    np.testing.assert_array_equal(sample.action[..., 0], sample.reward)
    np.testing.assert_array_equal(sample.next_obs, sample.obs + 1)


def test_play_yields_the_transitions_of_an_episode(rng):
    """The reward is -(angle² + 0.1 speed² + 0.001 torque²)."""
    pendulums = pendulum.make_pendulums(2)
    actions = rng.uniform(-1, 1, size=(200, 2, 1))
    queue = iter(actions)
    steps = [*pendulum.play(pendulums, 0, lambda _: next(queue))]
    obs, action, reward, next_obs, terminated = map(np.stack, zip(*steps, strict=True))
    assert obs.shape == (200, 2, 3)
    np.testing.assert_array_equal(action, actions)
    np.testing.assert_array_equal(next_obs[:-1], obs[1:])
    assert not terminated.any()
    angle = np.arctan2(obs[..., 1], obs[..., 0])
    cost = angle**2 + 0.1 * obs[..., 2] ** 2 + 0.001 * (2 * action[..., 0]) ** 2
    np.testing.assert_allclose(reward, -cost, rtol=1e-4, atol=1e-5)


def test_evaluate_starts_all_runs_alike():
    pendulums, seen = pendulum.make_pendulums(6), []

    def policy(obs):
        seen.append(obs)
        return np.array([0.0, 1.0])[:, None, None] * np.ones((2, 3, 1))

    first, second = pendulum.evaluate(pendulums, policy, runs=2)
    np.testing.assert_array_equal(seen[0][0], seen[0][1])
    assert first != second
    still = [
        s[2]
        for s in pendulum.play(
            pendulum.make_pendulums(3), 0, lambda _: np.zeros((3, 1))
        )
    ]
    np.testing.assert_allclose(first, np.sum(still, 0).mean())


def test_table_compares_with_the_first_critics():
    curves = {
        "none": {2: np.array([-900.0, -800.0]), 4: np.array([-200.0, -700.0])},
        "norm": {2: np.array([-100.0, -400.0]), 4: np.array([-100.0, -200.0])},
    }
    table = pendulum.make_table(curves)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["none", "norm"]
    assert columns[1][1] == "-200 (-300, -100)\nbetter"
    assert columns[3] == ["4, never", "2, 4"]
    verdict = pendulum.verdict
    assert verdict(np.array([1, 3]), np.array([2, 4])) == "no clear difference"
    assert verdict(np.array([0, 1]), np.array([2, 4])) == "worse"
