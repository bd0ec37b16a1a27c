"""The pure updates against torch.optim, their vjps against automatic differentiation, all in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.optimizers.adam import second_moment_change
from curate.optimizers.muon import newton_schulz
from curate.optimizers.settings import GroupSettings
from curate.optimizers.state import Group, TrainingState
from curate.optimizers.step import update_state, update_vjp

SHAPES = ((2, 3), (4, 2)), ((3, 3), (1, 5))
SPLIT, P = 14, 28
NS = {"ns_steps": 5, "ns_a": 3.4445, "ns_b": -4.775, "ns_c": 2.0315, "eps": 1e-7}

ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
VARIANTS = {
    "AdamW": GroupSettings(optimizer="AdamW", lr=0.01, weight_decay=0.1, **ADAM),
    "Adam": GroupSettings(optimizer="Adam", lr=0.01, weight_decay=0.1, **ADAM),
    "Adam without decay": GroupSettings(optimizer="Adam", lr=0.003, beta1=0.8, beta2=0.99, eps=1e-6),
    "SGD": GroupSettings(optimizer="SGD", lr=0.02, weight_decay=0.1),
    "momentum": GroupSettings(optimizer="SGD", lr=0.02, weight_decay=0.1, momentum=0.9),
    "dampened": GroupSettings(optimizer="SGD", lr=0.02, momentum=0.9, dampening=0.4),
    "Nesterov": GroupSettings(optimizer="SGD", lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True),
    "Muon": GroupSettings(
        optimizer="Muon", lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original", **NS
    ),
    "Muon without Nesterov": GroupSettings(
        optimizer="Muon", lr=0.01, momentum=0.9, adjust_lr_fn="match_rms_adamw", **{**NS, "ns_steps": 2}
    ),
}
EXACT = [name for name in VARIANTS if not name.startswith("Muon")]


def groups(first: GroupSettings, second: GroupSettings) -> list[Group]:
    places = slice(0, SPLIT), slice(SPLIT, P)
    return [
        Group(place=place, shapes=shapes, settings=settings)
        for place, shapes, settings in zip(places, SHAPES, (first, second), strict=True)
    ]


def torch_steps(both: list[Group], start: torch.Tensor, gradients: list[torch.Tensor], clip_norm: float | None):
    """The parameters after each step of torch's own optimizers."""
    split = [part for group in both for part in start[group.place].split([m * n for m, n in group.shapes])]
    shapes = [shape for group in both for shape in group.shapes]
    parts = [torch.nn.Parameter(part.clone().view(shape)) for part, shape in zip(split, shapes, strict=True)]
    optimizers = [
        getattr(torch.optim, group.settings.optimizer)([{"params": own, **group.settings.as_group()}], lr=1.0)
        for group, own in zip(both, (parts[:2], parts[2:]), strict=True)
    ]
    for gradient in gradients:
        for part, piece in zip(parts, gradient.split([part.numel() for part in parts]), strict=True):
            part.grad = piece.clone().view(part.shape)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parts, clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        yield torch.cat([part.detach().reshape(-1) for part in parts])


def drawn_gradients(steps: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(P, generator=random, dtype=torch.float64) for _ in range(steps + 1))
    for gradient in gradients:
        gradient[3] = 0.0  # a parameter that is never touched
    return start, gradients


@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
@pytest.mark.parametrize("variant", EXACT)
def test_update_equals_torch_over_100_steps(variant, clip_norm):
    both = groups(VARIANTS[variant], dataclasses.replace(VARIANTS["AdamW"], weight_decay=0.0))
    start, gradients = drawn_gradients(100)
    state = TrainingState.zeros(start)
    for step, wanted in enumerate(torch_steps(both, start, gradients, clip_norm)):
        state = update_state(state, gradients[step], [step, step], both, clip_norm)
        torch.testing.assert_close(state.parameters, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("Muon")])
def test_muon_equals_torch_to_the_precision_of_its_bfloat16_iteration(variant, adjust_lr_fn):
    settings = dataclasses.replace(VARIANTS[variant], adjust_lr_fn=adjust_lr_fn)
    both = groups(settings, VARIANTS["AdamW"])
    start, gradients = drawn_gradients(20)
    state, moved = TrainingState.zeros(start), 0.0
    for step, wanted in enumerate(torch_steps(both, start, gradients, 0.5)):
        before, state = state, update_state(state, gradients[step], [step, step], both, 0.5)
        moved += float((state.parameters - before.parameters)[:SPLIT].norm())
        assert float((state.parameters - wanted)[:SPLIT].norm()) < 0.03 * moved
        torch.testing.assert_close(state.parameters[SPLIT:], wanted[SPLIT:], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_newton_schulz_in_bfloat16_is_torchs_step(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    settings = VARIANTS["Muon"]
    part = torch.nn.Parameter(torch.zeros(shape))
    part.grad = matrix.clone()
    torch.optim.Muon([part], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    scale = max(1, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(-part.detach() / scale, newton_schulz(matrix.bfloat16(), settings).float())


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_newton_schulz_applies_its_polynomial_to_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(newton_schulz(matrix, VARIANTS["Muon"]), left * values @ right)


@given(
    first=st.sampled_from(sorted(VARIANTS)),
    second=st.sampled_from(sorted(VARIANTS)),
    seed=st.integers(0, 10_000),
    updates=st.integers(0, 50),
    lr=st.floats(1e-5, 0.5),
    wd=st.floats(0, 0.5),
    clip_norm=st.one_of(st.none(), st.floats(0.05, 20)),
)
def test_vjp_equals_automatic_differentiation(first, second, seed, updates, lr, wd, clip_norm):
    check_vjp(dataclasses.replace(VARIANTS[first], lr=lr, weight_decay=wd), VARIANTS[second], seed, updates, clip_norm)


@pytest.mark.parametrize("updates", [0, 7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_vjp_of_every_optimizer_with_an_active_clip(variant, updates):
    check_vjp(VARIANTS[variant], VARIANTS["AdamW"], 1, updates, 0.5)


def check_vjp(first: GroupSettings, second: GroupSettings, seed: int, updates: int, clip_norm: float | None) -> None:
    both, counts = groups(first, second), [updates, 3]
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    state = TrainingState(parameters=draw(P), momentum=draw(P), second_moment=draw(P) ** 2)
    gradient = draw(P)
    cotangent = TrainingState(parameters=draw(3, P), momentum=draw(3, P), second_moment=draw(3, P))
    kept = {name: tensor.clone() for name, tensor in vars(cotangent).items()}

    def update(parameters, momentum, second_moment, ghat):
        before = TrainingState(parameters=parameters, momentum=momentum, second_moment=second_moment)
        after = update_state(before, ghat, counts, both, clip_norm)
        return after.parameters, after.momentum, after.second_moment

    _, pull = torch.func.vjp(update, state.parameters, state.momentum, state.second_moment, gradient)
    u, before = update_vjp(state, gradient, counts, both, clip_norm, cotangent)
    for r in range(3):
        wanted = pull((cotangent.parameters[r], cotangent.momentum[r], cotangent.second_moment[r]))
        found = (before.parameters[r], before.momentum[r], before.second_moment[r], u[r])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    for name, tensor in vars(cotangent).items():
        torch.testing.assert_close(tensor, kept[name], rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vjp_is_finite_where_nothing_was_ever_seen(variant):
    zeros = torch.zeros(P, dtype=torch.float64)
    both = groups(VARIANTS[variant], VARIANTS["AdamW"])
    state, ones = TrainingState.zeros(zeros), torch.ones(1, P, dtype=torch.float64)
    u, before = update_vjp(state, zeros, [0, 0], both, 1.0, TrainingState.zeros(ones))
    assert torch.isfinite(u).all()
    for tensor in vars(before).values():
        assert torch.isfinite(tensor).all()
    assert (before.second_moment == 0).all()
    if variant.startswith("Muon"):
        assert (u[:, :SPLIT] == 0).all()


def test_settings_survive_torchs_groups():
    for settings in VARIANTS.values():
        assert GroupSettings.read(settings.optimizer, settings.as_group()) == settings


@given(v=st.floats(1e-12, 1e3), factor=st.floats(1, 1e8), m=st.floats(-10, 10))
def test_a_second_moment_that_grows_ends_the_updates_that_it_divides(v, factor, m):
    """Later updates without gradients, sum_j c_j m / sqrt(v): what the derivative by v, carried on, must give back."""
    scale = sum(0.9**j / 0.95 ** (j / 2) for j in range(1, 6))

    def later(moment: float) -> float:
        return scale * m / moment**0.5

    slope = -0.5 * scale * m / v**1.5
    change = second_moment_change(
        torch.tensor([v], dtype=torch.float64), torch.tensor([[v * factor]], dtype=torch.float64)
    )
    assert slope * float(change) == pytest.approx(later(v * factor) - later(v), rel=1e-6, abs=1e-9 * abs(later(v)))


@given(v=st.floats(0, 1e3), changed=st.floats(0, 1e3))
def test_a_change_of_the_second_moment_keeps_its_sign_and_is_bounded(v, changed):
    """Small changes are what they are; one that shrinks takes away what there is, one that grows twice that at most."""
    change = float(second_moment_change(*(torch.tensor([one], dtype=torch.float64) for one in (v, changed))))
    assert -v <= change <= 2 * v
    assert change * (changed - v) >= 0
    if abs(changed - v) < 1e-3 * v:
        assert change == pytest.approx(changed - v, rel=1e-3, abs=1e-12)


def test_pieces_change_no_number(monkeypatch):
    both = groups(VARIANTS["AdamW"], VARIANTS["Muon"])
    numbers, names = torch.Generator().manual_seed(0), ("parameters", "momentum", "second_moment")
    state = TrainingState(**{name: torch.rand(P, generator=numbers).double() for name in names})
    gradient = torch.randn(P, generator=numbers).double()
    cotangent = TrainingState(**{name: torch.randn(3, P, generator=numbers).double() for name in names})
    whole = update_state(state, gradient, [4, 4], both, 0.5), update_vjp(state, gradient, [4, 4], both, 0.5, cotangent)
    monkeypatch.setattr("curate.optimizers.step._CPU_PIECE", 1)
    cut = update_state(state, gradient, [4, 4], both, 0.5), update_vjp(state, gradient, [4, 4], both, 0.5, cotangent)
    torch.testing.assert_close(vars(cut[0]), vars(whole[0]), rtol=0, atol=0)
    torch.testing.assert_close(cut[1][0], whole[1][0], rtol=0, atol=0)
    torch.testing.assert_close(vars(cut[1][1]), vars(whole[1][1]), rtol=0, atol=0)
