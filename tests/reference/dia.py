"""Reference for the DIA-LSTM cell of DIANet (arXiv 1905.10671), one scalar at a time."""

import torch
from torch import Tensor


def _sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def _gate_network(x: Tensor, params: dict[str, Tensor], source: str) -> list[Tensor]:
    """B ReLU(A x + a) + b for one image: x is (C,), the result a list of 4C scalars."""
    reduce_weight = params[f"{source}_reduce.weight"].to(x.dtype)  # A: m x C
    reduce_bias = params[f"{source}_reduce.bias"].to(x.dtype)  # a: m
    expand_weight = params[f"{source}_expand.weight"].to(x.dtype)  # B: 4C x m
    expand_bias = params[f"{source}_expand.bias"].to(x.dtype)  # b: 4C

    hidden = []
    for row, bias in zip(reduce_weight, reduce_bias, strict=True):
        z = torch.dot(row, x) + bias
        hidden.append(z if z > 0 else torch.zeros_like(z))
    hidden = torch.stack(hidden)

    out = []
    for row, bias in zip(expand_weight, expand_bias, strict=True):
        out.append(torch.dot(row, hidden) + bias)
    return out


def dia_cell(g: Tensor, h: Tensor, c: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One step of the DIA-LSTM (arXiv 1905.10671); returns the new (h, c), and h is the channel gate.

    g (pooled branch output), h and c are B x C. ``params`` holds ``{x,h}_reduce.{weight,bias}``
    (m x C, m) and ``{x,h}_expand.{weight,bias}`` (4C x m, 4C), the 4C rows ordered i, f, u, o:

        c' = sigmoid(f) c + sigmoid(i) tanh(u),    h' = sigmoid(o) sigmoid(c')
    """
    batch, channels = g.shape
    new_h, new_c = [], []
    for n in range(batch):
        from_input = _gate_network(g[n], params, "x")
        from_state = _gate_network(h[n], params, "h")
        assert len(from_input) == len(from_state) == 4 * channels
        h_row, c_row = [], []
        for k in range(channels):
            i = from_input[k] + from_state[k]
            f = from_input[channels + k] + from_state[channels + k]
            u = from_input[2 * channels + k] + from_state[2 * channels + k]
            o = from_input[3 * channels + k] + from_state[3 * channels + k]
            c_next = _sigmoid(f) * c[n, k] + _sigmoid(i) * torch.tanh(u)
            c_row.append(c_next)
            h_row.append(_sigmoid(o) * _sigmoid(c_next))
        new_h.append(torch.stack(h_row))
        new_c.append(torch.stack(c_row))
    return torch.stack(new_h), torch.stack(new_c)
