"""DIA and ASR against plain computations, and wrong versions of them that must be told apart."""

import pytest
import torch
from helpers import randomise
from reference.asr import asr_gate, fold_batchnorm, se_generator
from reference.dia import dia_cell

from timm_attn.algebra import scale_affine
from timm_attn.layers import ASR, DIACell, SEGenerator


def below(state: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def check_cell(channels: int, reduction: int, steps: int = 4) -> None:
    """Several steps of a cell with random weights, compared in float64."""
    torch.manual_seed(channels)
    cell = randomise(DIACell(channels, reduction, dtype=torch.float64))
    h = c = h_ref = c_ref = torch.zeros(3, channels, dtype=torch.float64)
    for _ in range(steps):
        g = torch.randn(3, channels, dtype=torch.float64)
        h, c = cell(g, h, c)
        h_ref, c_ref = dia_cell(g, h_ref, c_ref, cell.state_dict())
        torch.testing.assert_close(h, h_ref, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(c, c_ref, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("channels", "reduction"), [(8, 1), (16, 4), (10, 4), (6, 20)])
def test_dia_cell_is_the_papers(channels, reduction):
    check_cell(channels, reduction)
    assert DIACell(channels, reduction).x_reduce.out_features == max(1, channels // reduction)


def tanh_output(self, g, h, c):
    gates = self.x_expand(self.x_reduce(g).relu()) + self.h_expand(self.h_reduce(h).relu())
    i, f, u, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * u.tanh()
    return o.sigmoid() * c.tanh(), c


def swapped(first: int, second: int):
    def forward(self, g, h, c):
        gates = self.x_expand(self.x_reduce(g).relu()) + self.h_expand(self.h_reduce(h).relu())
        parts = list(gates.chunk(4, dim=1))
        parts[first], parts[second] = parts[second], parts[first]
        i, f, u, o = parts
        c = f.sigmoid() * c + i.sigmoid() * u.tanh()
        return o.sigmoid() * c.sigmoid(), c

    return forward


WRONG_CELLS = {"tanh output": tanh_output} | {
    f"gates {'ifuo'[a]} and {'ifuo'[b]} swapped": swapped(a, b) for a in range(4) for b in range(a + 1, 4)
}


@pytest.mark.parametrize("name", WRONG_CELLS)
def test_wrong_dia_cells_are_told_apart(name, monkeypatch):
    monkeypatch.setattr(DIACell, "forward", WRONG_CELLS[name])
    with pytest.raises(AssertionError):
        check_cell(16, 4)


def test_dia_gates_each_channel_by_its_state():
    cell = randomise(DIACell(6, 2))
    x, h = torch.randn(2, 6, 5, 5), torch.zeros(2, 6)
    y, h, _ = cell.gate(x, h, h)
    torch.testing.assert_close(y, x * h[:, :, None, None])
    assert ((h > 0) & (h < 1)).all()


def test_a_fresh_dia_gate_is_about_a_quarter():
    torch.manual_seed(0)
    cell = DIACell(1024, 20)
    zero = torch.zeros(4, 1024)
    h, _ = cell(torch.randn(4, 1024), zero, zero)
    assert abs(h.mean() - 0.25) < 0.01


@pytest.mark.parametrize(("channels", "delta", "reduction"), [(16, 1, 16), (32, 2, 16), (10, 3, 4)])
def test_asr_gate_is_the_papers(channels, delta, reduction):
    asr = randomise(ASR(channels, delta, reduction, dtype=torch.float64))
    state = asr.state_dict()
    generators = [below(state, f"generators.{j}.") for j in range(delta)]
    gate = asr_gate(generators)
    torch.testing.assert_close(asr.gate()[0], gate, rtol=1e-12, atol=1e-14)
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(asr(x), x * gate[None, :, None, None])
    assert gate.std() > 0.01
    one = asr.generators[0]
    torch.testing.assert_close(one()[0], se_generator(generators[0]["psi"], generators[0]))


def test_asr_starts_as_the_papers():
    generator = SEGenerator(256)
    assert generator.psi.shape == (1, 256)
    assert (generator.psi == 0.1).all()
    assert generator.fc1.out_features == 16
    assert abs(generator().mean() - 0.5) < 0.05


def test_fold_maths_is_the_papers():
    weight, bias, gate = torch.randn(3, 12, dtype=torch.float64)
    for ours, reference in zip(
        scale_affine(weight, bias, gate), fold_batchnorm(weight, bias, gate), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-15, atol=0)
    assert scale_affine(weight.bfloat16(), bias.bfloat16(), gate.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make",
    [lambda: DIACell(8, 0), lambda: ASR(8, 0), lambda: ASR(8, 1, 0)],
    ids=["dia r", "asr delta", "asr r"],
)
def test_options_below_one_are_refused(make):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        make()
