"""The pure update against torch.optim, its vjp against automatic differentiation, all in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.embeddings.adamw import TrainingState, adamw_update, adamw_vjp
from curate.trajectory.replay import GroupSettings

P = 11
SPLIT = 6


def groups(lr: float = 0.01, wd: float = 0.1) -> list[tuple[slice, GroupSettings]]:
    first = GroupSettings(lr=lr, weight_decay=wd, beta1=0.9, beta2=0.95, eps=1e-8)
    second = GroupSettings(lr=lr / 3, weight_decay=0.0, beta1=0.8, beta2=0.99, eps=1e-6)
    return [(slice(0, SPLIT), first), (slice(SPLIT, P), second)]


@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
def test_update_equals_torch_adamw_over_100_steps(clip_norm):
    random = torch.Generator().manual_seed(0)
    start = torch.randn(P, generator=random, dtype=torch.float64)
    parts = [torch.nn.Parameter(start[place].clone()) for place, _ in groups()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [part], "lr": s.lr, "weight_decay": s.weight_decay, "betas": (s.beta1, s.beta2), "eps": s.eps}
            for part, (_, s) in zip(parts, groups(), strict=True)
        ]
    )
    state = TrainingState(parameters=start, exp_avg=torch.zeros_like(start), exp_avg_sq=torch.zeros_like(start))
    for step in range(100):
        gradient = torch.randn(P, generator=random, dtype=torch.float64)
        gradient[3] = 0.0  # a parameter that is never touched
        for part, (place, _) in zip(parts, groups(), strict=True):
            part.grad = gradient[place].clone()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parts, clip_norm)
        optimizer.step()
        state = adamw_update(state, gradient, step, groups(), clip_norm)
        torch.testing.assert_close(
            state.parameters, torch.cat([part.detach() for part in parts]), rtol=1e-11, atol=1e-12
        )


@given(
    seed=st.integers(0, 10_000),
    updates=st.integers(0, 50),
    lr=st.floats(1e-5, 0.5),
    wd=st.floats(0, 0.5),
    clip_norm=st.one_of(st.none(), st.floats(0.05, 20)),
)
def test_vjp_equals_automatic_differentiation(seed, updates, lr, wd, clip_norm):
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    state = TrainingState(parameters=draw(P), exp_avg=draw(P), exp_avg_sq=draw(P) ** 2)
    gradient, cotangent = draw(P), TrainingState(parameters=draw(3, P), exp_avg=draw(3, P), exp_avg_sq=draw(3, P))

    def update(parameters, exp_avg, exp_avg_sq, ghat):
        before = TrainingState(parameters=parameters, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        after = adamw_update(before, ghat, updates, groups(lr, wd), clip_norm)
        return after.parameters, after.exp_avg, after.exp_avg_sq

    _, pull = torch.func.vjp(update, state.parameters, state.exp_avg, state.exp_avg_sq, gradient)
    u, before = adamw_vjp(state, gradient, updates, groups(lr, wd), clip_norm, cotangent)
    for r in range(3):
        wanted = pull((cotangent.parameters[r], cotangent.exp_avg[r], cotangent.exp_avg_sq[r]))
        found = (before.parameters[r], before.exp_avg[r], before.exp_avg_sq[r], u[r])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_vjp_is_finite_where_nothing_was_ever_seen():
    zeros = torch.zeros(P, dtype=torch.float64)
    state = TrainingState(parameters=zeros + 1, exp_avg=zeros, exp_avg_sq=zeros)
    ones = torch.ones(1, P, dtype=torch.float64)
    u, before = adamw_vjp(
        state, zeros, 0, groups(), 1.0, TrainingState(parameters=ones, exp_avg=0 * ones, exp_avg_sq=0 * ones)
    )
    assert torch.isfinite(u).all()
    assert torch.isfinite(before.exp_avg_sq).all()
    assert (before.exp_avg_sq == 0).all()
