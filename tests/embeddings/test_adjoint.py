"""`adjoint` against finite differences of training itself, in float64."""

import dataclasses

import pytest
import torch
from torch.autograd.function import once_differentiable

from curate.core.errors import UserError
from curate.embeddings.adjoint import StepOptions, adjoint_step
from curate.embeddings.leave_one_out import embedding_corrections, exact_values
from curate.embeddings.products import check_curvature, difference_products, exact_products
from curate.optimizers.settings import GroupSettings
from curate.optimizers.state import TrainingState
from curate.optimizers.step import update_state
from curate.training.layout import FlatLayout
from curate.training.replay import State, StepRecord
from curate.training.task import Batch, ModelSpec, Task, TaskSpec
from tests.tiny import VOCABULARY

STEPS, BATCH, LENGTH = 5, 4, 7


ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
NS = {"ns_steps": 5, "ns_a": 3.4445, "ns_b": -4.775, "ns_c": 2.0315, "eps": 1e-7, "adjust_lr_fn": "original"}
ADAMW = GroupSettings(optimizer="AdamW", lr=0.02, weight_decay=0.1, **ADAM)
VECTORS = GroupSettings(optimizer="AdamW", lr=0.01, **ADAM)
SGD = GroupSettings(optimizer="SGD", lr=0.2, weight_decay=0.1)
MOMENTUM = dataclasses.replace(SGD, lr=0.1, momentum=0.9)
MUON = GroupSettings(optimizer="Muon", lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, **NS)
OPTIMIZERS = {  # of the hidden matrices, of embeddings and head, of the vectors
    "AdamW": (ADAMW, ADAMW, VECTORS),
    "Adam": tuple(dataclasses.replace(settings, optimizer="Adam") for settings in (ADAMW, ADAMW, VECTORS)),
    "SGD": (SGD, SGD, dataclasses.replace(SGD, lr=0.1, weight_decay=0.0)),
    "momentum": (MOMENTUM, MOMENTUM, dataclasses.replace(MOMENTUM, lr=0.05, weight_decay=0.0)),
    "dampening": (dataclasses.replace(MOMENTUM, dampening=0.4),) * 3,
    "Nesterov": (dataclasses.replace(MOMENTUM, nesterov=True),) * 3,
    "SGD and AdamW": (MOMENTUM, ADAMW, dataclasses.replace(VECTORS, optimizer="Adam")),
    "Muon and AdamW": (MUON, ADAMW, VECTORS),
    "Muon without Nesterov and SGD": (dataclasses.replace(MUON, nesterov=False), SGD, SGD),
}


def record(step: int, optimizer: str, skips: frozenset[tuple[int, int]] = frozenset()) -> StepRecord:
    groups = [
        dataclasses.replace(settings, lr=settings.lr / (1 + step), updated=(step, group) not in skips)
        for group, settings in enumerate(OPTIMIZERS[optimizer])
    ]
    return StepRecord(step=step, micro_batches=[], loss=0.0, grad_norm=None, clip_factor=1.0, groups=groups)


class Problem:
    """A few steps of a tiny model with two micro-batches, unequal weights, masks, clipping and unseen tokens.

    `skips` are updates (step, group) that are not taken.
    """

    def __init__(
        self,
        clip_norm: float | None,
        *,
        tied: bool = True,
        optimizer: str = "AdamW",
        skips: frozenset[tuple[int, int]] = frozenset(),
    ) -> None:
        random = torch.Generator().manual_seed(1)
        self.clip_norm, self.optimizer, self.skips = clip_norm, optimizer, skips
        spec = TaskSpec(model=ModelSpec(factory="tests.tiny:factory", kwargs={"tied": tied}))
        self.task = Task(spec, dtype=torch.float64)
        outer = [name for name, _ in self.task.model.named_parameters() if name.startswith(("embedding", "lm_head"))]
        hidden = [name for name, p in self.task.model.named_parameters() if p.dim() > 1 and name not in outer]
        vectors = [name for name, p in self.task.model.named_parameters() if p.dim() == 1]
        self.layout = FlatLayout(self.task.model, [hidden, outer, vectors])
        self.start = self.layout.flatten(dict(self.task.model.named_parameters())).detach()

        def batch() -> Batch:
            weights = torch.rand(BATCH, generator=random, dtype=torch.float64) + 0.05
            mask = torch.rand(BATCH, LENGTH, generator=random) > 0.3
            mask[:, 1] = True
            tokens = torch.randint(0, VOCABULARY // 4, (BATCH, LENGTH), generator=random)
            return Batch(tokens=tokens, loss_mask=mask, weights=weights / weights.sum() / 2)

        self.batches = [[batch(), batch()] for _ in range(STEPS)]
        self.targets = [batch(), batch()]

    def loss(self, batches: list[Batch], flat: torch.Tensor) -> torch.Tensor:
        values = self.layout.views(flat)
        return sum((self.task.sample_losses(b, values) * b.weights).sum() for b in batches)

    def gradient(self, batches: list[Batch], flat: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda value: self.loss(batches, value))(flat)

    def train(self, batches: list[list[Batch]]) -> tuple[torch.Tensor, list[State]]:
        state = TrainingState.zeros(self.start)
        states = []
        for step in range(STEPS):
            gradient = self.gradient(batches[step], state.parameters)
            done = record(step, self.optimizer, self.skips)
            updates = [sum((k, group) not in self.skips for k in range(step)) for group in range(len(done.groups))]
            states.append(State(record=done, batches=batches[step], gradient=gradient, updates=updates, **vars(state)))
            state = update_state(state, gradient, updates, self.layout.groups(done.groups), self.clip_norm)
        return state.parameters, states

    def cotangents(self, states: list[State], final: torch.Tensor, **options) -> list[tuple]:
        """Rows of each step, and the cotangent of the state after it."""
        anchors = torch.stack([self.gradient([target], final) for target in self.targets])
        cotangent = TrainingState.zeros(anchors)
        found = []
        for state in reversed(states):
            after = cotangent
            rows, cotangent = adjoint_step(
                self.task, self.layout, state, self.clip_norm, cotangent, StepOptions(**options)
            )
            found.append((rows, after))
        return found[::-1]

    def embeddings(self, states: list[State], final: torch.Tensor, **options) -> list[torch.Tensor]:
        return [rows for rows, _ in self.cotangents(states, final, **options)]

    def resume(self, state: TrainingState, step: int) -> torch.Tensor:
        """Parameters at the end of training that goes on from a state before `step`."""
        for later in range(step, STEPS):
            done = record(later, self.optimizer)
            gradient = self.gradient(self.batches[later], state.parameters)
            state = update_state(
                state, gradient, [later] * len(done.groups), self.layout.groups(done.groups), self.clip_norm
            )
        return state.parameters

    def scaled(self, step: int, part: int, sample: int, factor: float) -> list[list[Batch]]:
        """The batches with one sample's weight multiplied."""
        weights = self.batches[step][part].weights.clone()
        weights[sample] *= factor
        changed = [list(batches) for batches in self.batches]
        changed[step][part] = dataclasses.replace(self.batches[step][part], weights=weights)
        return changed


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("clip_norm", [0.3, None, 1000.0])
def test_embeddings_are_the_derivative_of_training(clip_norm, tied):
    """E[z] is the first-order effect of removing z: d l_q(theta_S) / d(weight of z) * (-c_z), for both targets."""
    check_against_finite_differences(Problem(clip_norm, tied=tied))


@pytest.mark.parametrize(("clip_norm", "tied"), [(0.3, False), (None, True)])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "AdamW"])
def test_embeddings_are_the_derivative_of_training_with_every_optimizer(optimizer, clip_norm, tied):
    check_against_finite_differences(Problem(clip_norm, tied=tied, optimizer=optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "Muon and AdamW", "momentum"])
@pytest.mark.parametrize("skips", [{(2, 0), (2, 1), (2, 2)}, {(1, 0), (3, 1)}], ids=["whole step", "one optimizer"])
def test_embeddings_are_the_derivative_of_training_that_skipped_updates(optimizer, skips):
    problem = Problem(0.3, optimizer=optimizer, skips=frozenset(skips))
    check_against_finite_differences(problem)
    final, states = problem.train(problem.batches)
    for own_step in ("linear", "embedding", "exact"):
        rows = problem.embeddings(states, final, own_step=own_step)
        skipped = [not state.record.updated for state in states]
        assert [bool((each == 0).all()) for each in rows] == skipped


def test_a_skipped_batch_may_be_one_that_overflowed():
    """Neither its gradient nor its curvature is looked at."""
    problem = Problem(0.3, skips=frozenset({(2, 0), (2, 1), (2, 2)}))
    final, states = problem.train(problem.batches)
    expected = problem.embeddings(states, final)
    states[2] = dataclasses.replace(states[2], gradient=torch.full_like(states[2].gradient, torch.nan))
    for found, wanted in zip(problem.embeddings(states, final), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def check_against_finite_differences(problem: Problem) -> None:
    clip_norm, tied = problem.clip_norm, "lm_head.weight" not in problem.layout.names
    final, states = problem.train(problem.batches)
    never_seen = sum(state.gradient.abs() for state in states) == 0
    assert never_seen.any() != tied  # rows of tokens
    rows = problem.embeddings(states, final)
    if clip_norm == 0.3:
        assert all(float(state.gradient.norm()) > clip_norm for state in states)
    epsilon = 1e-5
    for step, part, sample in [(0, 0, 0), (0, 1, 2), (1, 0, 3), (2, 1, 1), (4, 0, 0), (4, 1, 3)]:
        up, _ = problem.train(problem.scaled(step, part, sample, 1 + epsilon))
        down, _ = problem.train(problem.scaled(step, part, sample, 1 - epsilon))
        for anchor, target in enumerate(problem.targets):
            slope = (problem.loss([target], up) - problem.loss([target], down)) / (2 * epsilon)
            found = rows[step][part * BATCH + sample, anchor]
            assert float(found) == pytest.approx(-float(slope), rel=1e-4, abs=1e-9)


def test_products_equal_a_plain_loop_over_samples():
    problem = Problem(None)
    batch, directions = problem.batches[0][0], torch.randn(3, problem.layout.size, dtype=torch.float64)
    products, curvature = exact_products(problem.task, problem.layout, batch, problem.start, directions)
    for z in range(BATCH):
        alone = dataclasses.replace(batch.split(1)[z], weights=torch.ones(1, dtype=torch.float64))
        torch.testing.assert_close(products[:, z], directions @ problem.gradient([alone], problem.start))
    hessian = torch.func.jacfwd(lambda flat: problem.gradient([batch], flat))(problem.start)
    torch.testing.assert_close(curvature, directions @ hessian.T)


def by_difference(task, layout, batch, parameters, directions):
    return difference_products(task, layout, [batch], parameters, directions)


def test_differences_of_gradients_approach_the_exact_product():
    problem = Problem(None)
    batch, directions = problem.batches[0][0], torch.randn(2, problem.layout.size, dtype=torch.float64)
    arguments = problem.task, problem.layout, batch, problem.start, directions
    for found, exact in zip(by_difference(*arguments), exact_products(*arguments), strict=True):
        assert float((found - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("products", [exact_products, by_difference])
def test_what_a_direction_gets_does_not_depend_on_the_others(products):
    problem = Problem(None)
    arguments = problem.task, problem.layout, problem.batches[0][0], problem.start
    directions = torch.randn(3, problem.layout.size, dtype=torch.float64)
    alone = [products(*arguments, one[None]) for one in directions]
    for place, together in enumerate(products(*arguments, directions)):
        torch.testing.assert_close(torch.cat([one[place] for one in alone]), together)


@pytest.mark.slow
@pytest.mark.parametrize("clip_norm", [0.3, None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_exact_own_step_is_the_first_order_effect_of_the_changed_state(optimizer, clip_norm):
    """d/dt l_q of training that goes on from s_{k+1} + t (f(s_k, ghat - c_z g_z) - s_{k+1}), at t = 0.

    A second moment that grows moves along v^-1/2: with w = v^-1/2, dv/dt = -2 w^-3 (w' - w).
    """
    problem = Problem(clip_norm, optimizer=optimizer)
    final, states = problem.train(problem.batches)
    rows = problem.embeddings(states, final, own_step="exact")
    for step, part, sample in [(0, 0, 1), (2, 1, 2), (4, 0, 3)]:
        state, done = states[step], record(step, optimizer)
        start = TrainingState(parameters=state.parameters, momentum=state.momentum, second_moment=state.second_moment)
        arguments = [step] * len(done.groups), problem.layout.groups(done.groups), problem.clip_norm
        without = problem.gradient(problem.scaled(step, part, sample, 0.0)[step], state.parameters)
        real, changed = (update_state(start, g, *arguments) for g in (state.gradient, without))

        def moved(t, real=real, changed=changed, step=step):
            between = {key: value + t * (vars(changed)[key] - value) for key, value in vars(real).items()}
            v, without = real.second_moment, changed.second_moment
            along = torch.where(without > v, -2 * v**1.5 * (without**-0.5 - v**-0.5), without - v)
            between["second_moment"] = v + t * along.nan_to_num(0.0)
            return problem.resume(TrainingState(**between), step + 1)

        for anchor, target in enumerate(problem.targets):
            slope = (problem.loss([target], moved(1e-5)) - problem.loss([target], moved(-1e-5))) / 2e-5
            found = rows[step][part * BATCH + sample, anchor]
            assert float(found) == pytest.approx(float(slope), rel=2e-4, abs=1e-9)


def test_a_weight_that_one_sample_alone_drives_gets_no_update_without_it():
    """In float32 the sample's gradient and the batch's differ by rounding, which Adam would make a full step of."""
    spec = TaskSpec(model=ModelSpec(factory="tests.tiny:factory", kwargs={"tied": False}))
    task = Task(spec)
    layout = FlatLayout(task.model, [[name for name, _ in task.model.named_parameters()]])
    start = layout.flatten(dict(task.model.named_parameters())).detach()
    tokens = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(3))
    tokens[1, 4] = 99  # in one sample only
    batch = Batch(tokens=tokens, loss_mask=torch.ones(4, 9, dtype=torch.bool), weights=torch.full((4,), 0.25))
    values = dict(task.model.named_parameters())
    loss = (task.sample_losses(batch) * batch.weights).sum()
    gradient = layout.flatten(dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True)))
    done = dataclasses.replace(record(0, "AdamW"), groups=[dataclasses.replace(ADAMW, weight_decay=0.0)])
    zeros = torch.zeros_like(start)
    state = State(
        record=done, batches=[batch], parameters=start, momentum=zeros, second_moment=zeros, gradient=gradient,
        updates=[0],
    )  # fmt: skip
    row = torch.zeros_like(start)
    row.view(-1)[:] = layout.flatten(
        {name: torch.ones_like(p) if name == "embedding.weight" else torch.zeros_like(p) for name, p in values.items()}
    )
    only = torch.zeros(VOCABULARY, 8)
    only[99] = 1.0
    row[row > 0] = only.flatten()
    cotangent = TrainingState.zeros(row[None] * gradient.sign())
    found = exact_values(task, layout, state, None, cotangent)[:, 0]
    assert float(found[1]) == pytest.approx(8 * 0.02, rel=1e-3)  # each of the row's 8 numbers would not move by lr
    assert found[[0, 2, 3]].abs().max() < 0.02


@pytest.mark.parametrize("clip_norm", [0.3, None])
def test_correcting_every_parameter_makes_the_own_step_exact_but_for_the_clip(clip_norm):
    problem = Problem(clip_norm)
    final, states = problem.train(problem.batches)
    for state, (linear, after) in zip(states, problem.cotangents(states, final), strict=True):
        arguments = problem.task, problem.layout, state, clip_norm, after
        corrected = linear + embedding_corrections(*arguments, problem.layout.names)
        if clip_norm is None:
            torch.testing.assert_close(corrected, exact_values(*arguments))
        embedding = problem.embeddings([state], final, own_step="embedding")[0]
        assert embedding.shape == linear.shape


def test_a_step_behind_the_window_passes_the_same_cotangent_on():
    problem = Problem(0.3)
    final, states = problem.train(problem.batches)
    for own_step in ("exact", "embedding"):
        for (_, one), (rows, other) in zip(
            problem.cotangents(states, final), problem.cotangents(states, final, rows=False, own_step=own_step),
            strict=True,
        ):  # fmt: skip
            assert rows is None
            for key, value in vars(one).items():
                torch.testing.assert_close(value, vars(other)[key])


@pytest.mark.parametrize("own_step", ["linear", "exact", "embedding"])
def test_values_do_not_depend_on_micro_batches(own_step):
    problem = Problem(0.3)
    final, states = problem.train(problem.batches)
    whole = problem.embeddings(states, final, own_step=own_step)
    parts = [
        dataclasses.replace(state, batches=[one for batch in state.batches for one in batch.split(1)])
        for state in states
    ]
    for one, other in zip(whole, problem.embeddings(parts, final, own_step=own_step), strict=True):
        torch.testing.assert_close(one, other)


class Opaque(torch.autograd.Function):
    """Stands for a fused kernel that can be differentiated once."""

    @staticmethod
    def forward(ctx, value):
        return value * 2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * 2


def test_a_model_without_second_derivatives_is_refused_by_name():
    problem = Problem(None)
    problem.task.model.mix.register_forward_hook(lambda _module, _inputs, output: Opaque.apply(output))
    with pytest.raises(
        UserError, match=r"module mix cannot be differentiated as adjoint.hessian exact needs .*difference"
    ):
        check_curvature(problem.task, problem.layout, problem.batches[0][0])


def test_a_diverged_step_is_named():
    problem = Problem(None)
    final, states = problem.train(problem.batches)
    broken = dataclasses.replace(states[3], gradient=states[3].gradient * float("nan"))
    with pytest.raises(UserError, match="not finite at step 3"):
        problem.embeddings([*states[:3], broken, states[4]], final)
