"""Swing up a pendulum by CrossQ: batch norm in the critics, and no target networks.

CrossQ is soft actor-critic with one forward pass for both sides of Bellman's equation:
(s, a) and (s', a') share a batch, and so the statistics of batch norm. Critics without
normalization, with batch norm and with batch renorm learn from the same settings.
Source: A. Bhatt et al., CrossQ, ICLR 2024, https://arxiv.org/abs/1902.05605.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _pendulum import (
    STEPS,
    ReplayBuffer,
    Returns,
    Transition,
    evaluate,
    make_pendulums,
    play,
    report,
)
from _training import make_parser
from flax.training.train_state import TrainState
from gymnasium.vector import SyncVectorEnv
from jax import Array, lax
from rich.console import Console
from rich.progress import track

import jaxbn.linen

DISCOUNT, TARGET_ENTROPY = 0.99, -1.0  # minus the number of actions
BATCH, BLOCK = 128, 10  # transitions of an update, updates of a call
WARM_UP, STARTS = 400, 5  # steps before the first update, episodes of a test

Norm = Callable[..., nn.Module]
ARMS: dict[str, Norm | None] = {
    "no normalization": None,
    "batch norm": jaxbn.linen.BatchNorm,
    "batch renorm": partial(  # for 1,000 updates batch norm, then less and less
        jaxbn.linen.BatchRenorm,
        r_max=optax.linear_schedule(1.0, 3.0, 2_000, transition_begin=1_000),
        d_max=optax.linear_schedule(0.0, 5.0, 2_000, transition_begin=1_000),
    ),
}


class Actor(nn.Module):
    """A policy: actions are tanh of samples from a Gaussian."""

    @nn.compact
    def __call__(self, obs: Array) -> tuple[Array, Array]:
        """Return the mean and the log deviation of the Gaussian."""
        x = obs
        for _ in range(2):
            x = nn.relu(nn.Dense(64)(x))
        mean, log_std = jnp.split(nn.Dense(2)(x), 2, axis=-1)
        return mean, jnp.clip(log_std, -10, 2)


class Critic(nn.Module):
    """The value Q of actions; normalizes the input and each hidden layer's output."""

    norm: Norm | None

    @nn.compact
    def __call__(self, obs: Array, action: Array, train: bool) -> Array:
        """Return Q; `train` normalizes with the statistics of this batch."""

        def norm(x: Array) -> Array:
            return x if self.norm is None else self.norm(not train)(x)

        x = norm(jnp.concatenate([obs, action], axis=-1))
        for _ in range(2):
            x = norm(nn.relu(nn.Dense(128)(x)))
        return nn.Dense(1)(x)[..., 0]


TwoCritics = nn.vmap(  # the smaller of their values counts
    Critic,
    variable_axes={"params": 0, "batch_stats": 0},
    split_rngs={"params": True},
    in_axes=None,  # pyright: ignore[reportArgumentType]
    axis_size=2,
)


class Temperature(nn.Module):
    """The weight of the entropy; its logarithm learns."""

    @nn.compact
    def __call__(self) -> Array:
        """Return the weight."""
        return jnp.exp(self.param("log", nn.initializers.constant(-2.0), ()))


class State(TrainState):
    """Parameters, optimizer state and running statistics, if any, of a network."""

    batch_stats: dict

    def __call__(self, params: Mapping, *args: Any, **options: Any) -> Any:
        """Apply the network with these parameters."""
        variables = {"params": params, "batch_stats": self.batch_stats}
        return self.apply_fn(variables, *args, **options)


class Agent(NamedTuple):
    """Everything that learns."""

    actor: State
    critic: State
    temperature: State


ACTOR, TEMPERATURE, OPTIMIZER = Actor(), Temperature(), optax.adam(1e-3, b1=0.5)


@jax.jit(static_argnames="norm")
def make_agent(norm: Norm | None, seed: int) -> Agent:
    """Return an untrained agent; its weights do not depend on `norm`."""

    def create(model: nn.Module, *args: object) -> State:
        key = jax.random.key(seed, impl="rbg")  # compiles faster than the default
        variables = {"batch_stats": {}, **model.init(key, *args)}
        return State.create(apply_fn=model.apply, tx=OPTIMIZER, **variables)

    obs, action = jnp.zeros((1, 3)), jnp.zeros((1, 1))
    critic = create(TwoCritics(norm), obs, action, False)
    return Agent(create(ACTOR, obs), critic, create(TEMPERATURE))


def sample_action(
    actor: State, params: Mapping, obs: Array, noise: Array
) -> tuple[Array, Array]:
    """Return actions, tanh of Gaussian samples, and their log-densities."""
    mean, log_std = actor(params, obs)
    u = mean + jnp.exp(log_std) * noise
    return jnp.tanh(u), log_prob(u, mean, log_std)


def log_prob(u: Array, mean: Array, log_std: Array) -> Array:
    """Return the log-density of tanh(u), with u from a Gaussian."""
    gaussian = jax.scipy.stats.norm.logpdf(u, mean, jnp.exp(log_std))
    log_slope = 2 * (jnp.log(2) - u - nn.softplus(-2 * u))  # log(1 - tanh(u)²)
    return (gaussian - log_slope).sum(-1)


def joint_pass(
    critic: State, params: Mapping, batch: Transition, next_action: Array
) -> tuple[Array, Array, dict]:
    """Return Q(s, a) and Q(s', a') from one batch, and the new running statistics."""
    obs = jnp.concatenate([batch.obs, batch.next_obs])
    action = jnp.concatenate([batch.action, next_action])
    q, new = critic(params, obs, action, True, mutable="batch_stats")
    q, next_q = jnp.split(q, 2, axis=-1)
    return q, next_q, new


def update_critic(agent: Agent, batch: Transition, noise: Array) -> Agent:
    """Move Q(s, a) towards the reward and the soft value of s'."""
    actor, critic, temperature = agent
    next_action, log_prob = sample_action(actor, actor.params, batch.next_obs, noise)
    entropy_bonus = -temperature(temperature.params) * log_prob

    def loss(params: Mapping) -> tuple[Array, dict]:
        q, next_q, new = joint_pass(critic, params, batch, next_action)
        value = next_q.min(0) + entropy_bonus
        target = batch.reward + DISCOUNT * (1 - batch.terminated) * value
        return ((q - lax.stop_gradient(target)) ** 2).mean(1).sum(), new

    grads, new = jax.grad(loss, has_aux=True)(critic.params)
    return agent._replace(critic=critic.apply_gradients(grads=grads, **new))


def update_actor(agent: Agent, obs: Array, noise: Array) -> Agent:
    """Raise the entropy and Q, normalized by running statistics; adapt the weight."""
    actor, critic, temperature = agent

    def loss(params: Mapping) -> tuple[Array, Array]:
        action, log_prob = sample_action(actor, params, obs, noise)
        q = critic(critic.params, obs, action, False).min(0)
        alpha = temperature(temperature.params)
        return (alpha * log_prob - q).mean(), -log_prob.mean()

    def temperature_loss(params: Mapping) -> Array:
        return temperature(params) * (entropy - TARGET_ENTROPY)

    grads, entropy = jax.grad(loss, has_aux=True)(actor.params)
    actor = actor.apply_gradients(grads=grads)
    grads = jax.grad(temperature_loss)(temperature.params)
    return Agent(actor, critic, temperature.apply_gradients(grads=grads))


@jax.jit
def update(agents: Agent, batches: Transition, noise: Array) -> Agent:
    """Update the agents of all runs, once per batch."""

    def step(agent: Agent, batch: Transition, noise: Array) -> Agent:
        agent = update_critic(agent, batch, noise[0])
        return update_actor(agent, batch.obs, noise[1])

    def steps(agents: Agent, inputs: tuple) -> tuple[Agent, None]:
        return jax.vmap(step)(agents, *inputs), None

    return lax.scan(steps, agents, (batches, noise))[0]


@jax.jit
def act(actors: State, obs: Array, noise: Array) -> Array:
    """Return the actions of all runs' policies."""
    return jax.vmap(sample_action)(actors, actors.params, obs, noise)[0]


def train_episode(
    agents: Agent, pendulums: SyncVectorEnv, buffer: ReplayBuffer, seed: int
) -> Agent:
    """Explore for an episode; after the warm-up, update once per step, in blocks."""
    normal, runs = buffer.rng.standard_normal, pendulums.num_envs

    def explore(obs: np.ndarray) -> Array:
        return act(agents.actor, obs, normal((runs, 1), np.float32))

    for step, transition in enumerate(play(pendulums, seed, explore), 1):
        buffer.add(*transition)
        if step % BLOCK == 0 and buffer.added > WARM_UP:
            noise = normal((BLOCK, runs, 2, BATCH, 1), np.float32)
            agents = update(agents, buffer.sample(BLOCK, BATCH), noise)
    return agents


def fit(name: str, seeds: range, episodes: int) -> Returns:
    """Train an agent per seed; return the test returns of all by step."""
    runs, rng = len(seeds), np.random.default_rng(seeds[0])
    pendulums, tests = make_pendulums(runs), make_pendulums(runs * STARTS)
    buffer, returns = ReplayBuffer(episodes * STEPS, runs, rng), {}
    each = [make_agent(ARMS[name], seed) for seed in seeds]
    agents = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    hidden = not Console().is_terminal
    no_noise = np.zeros((runs, 1, 1), np.float32)
    for episode in track(range(1, episodes + 1), name, disable=hidden):
        seed = 1000 * episode + seeds[0]
        agents = train_episode(agents, pendulums, buffer, seed)
        if episode % 2 == 0:
            policy = partial(act, agents.actor, noise=no_noise)
            returns[episode * STEPS] = evaluate(tests, policy, runs)
    return returns


def main() -> None:
    """Train with each kind of critics; print a table and write a picture."""
    quick = "one seed of 4 episodes instead of three of 30"
    args = make_parser(__doc__, quick, seed="first seed").parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + (1 if args.quick else 3))
    curves = {name: fit(name, seeds, 4 if args.quick else 30) for name in ARMS}
    report(curves, args.output)


if __name__ == "__main__":
    main()
