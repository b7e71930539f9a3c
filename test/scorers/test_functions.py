from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from scipy.stats import entropy as scipy_entropy

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.scorers import functions

LOGITS = hnp.arrays(np.float64, st.tuples(st.integers(2, 8), st.just(3), st.just(4)), elements=st.floats(-40, 40, width=32))


@settings(max_examples=60, deadline=None)
@given(logits=LOGITS, temperature=st.floats(0.1, 20))
def test_scores_equal_float64_references(logits: NDArray[np.float64], temperature: float) -> None:
    x = torch.from_numpy(logits)[None].float()
    p = softmax(logits, axis=0)
    expected = {
        "msp": 1 - p.max(0),
        "entropy": scipy_entropy(p, base=len(logits), axis=0),
        "max_logit": -logits.max(0),
        "energy": -temperature * logsumexp(logits / temperature, axis=0),
    }
    actual = {
        "msp": functions.msp(x),
        "entropy": functions.entropy(x),
        "max_logit": functions.max_logit(x),
        "energy": functions.energy(x, temperature),
    }
    for name, value in actual.items():
        assert value.shape == (1, 3, 4)
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value[0].numpy(), expected[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_known_values() -> None:
    uniform = torch.zeros(4, 1, 1)
    assert functions.msp(uniform).item() == pytest.approx(0.75)
    assert functions.entropy(uniform).item() == pytest.approx(1.0)
    assert functions.energy(uniform).item() == pytest.approx(-np.log(4))
    assert functions.hybrid(uniform, torch.full((1, 1), 2.0)).item() == pytest.approx(2 - np.log(4))
    certain = torch.tensor([100.0, 0, 0, 0]).view(4, 1, 1)
    assert functions.msp(certain).item() == 0.0
    assert functions.entropy(certain).item() == pytest.approx(0.0, abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_logits_are_widened(dtype: torch.dtype) -> None:
    # exp(200) overflows float16 and float32 alike; the stable forms must not.
    x = torch.tensor([200.0, 100.0]).view(2, 1, 1).to(dtype)
    assert functions.energy(x).item() == pytest.approx(-200.0)
    assert functions.entropy(x).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_energy_refuses_temperature(temperature: float) -> None:
    with pytest.raises(InputError, match=r"temperature is .* above 0"):
        functions.energy(torch.zeros(2, 1, 1), temperature)


def test_entropy_needs_two_classes() -> None:
    with pytest.raises(InputError, match="at least 2 classes, got 1"):
        functions.entropy(torch.zeros(1, 2, 2))
