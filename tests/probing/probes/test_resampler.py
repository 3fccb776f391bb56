"""The resampler against its published description, in plain float64 arithmetic."""

import math

import torch
from torch import Tensor

from probing.probes.resampler import Resampler, ResamplerConfig

LEAVES = {  # leaf -> shape, from the table of the published probe checkpoints
    "latents": "1 N D",
    "proj_in.weight": "D H",
    "proj_in.bias": "D",
    "layers.0.0.norm1.weight": "D",
    "layers.0.0.norm1.bias": "D",
    "layers.0.0.norm2.weight": "D",
    "layers.0.0.norm2.bias": "D",
    "layers.0.0.to_q.weight": "I D",
    "layers.0.0.to_kv.weight": "2I D",
    "layers.0.0.to_out.weight": "D I",
    "layers.0.1.0.weight": "D",
    "layers.0.1.0.bias": "D",
    "layers.0.1.1.weight": "M D",
    "layers.0.1.3.weight": "D M",
    "proj_out.weight": "O D",
    "proj_out.bias": "O",
    "norm_out.weight": "O",
    "norm_out.bias": "O",
}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight + bias


def by_hand(w: dict[str, Tensor], states: Tensor, heads: int, dim_head: int) -> Tensor:
    """One image at a time, one head at a time, without any module of torch.nn."""
    results = []
    for x in states:
        latents = w["latents"][0]
        x = x @ w["proj_in.weight"].T + w["proj_in.bias"]
        keys = layer_norm(x, w["layers.0.0.norm1.weight"], w["layers.0.0.norm1.bias"])
        queries = layer_norm(latents, w["layers.0.0.norm2.weight"], w["layers.0.0.norm2.bias"])
        q = queries @ w["layers.0.0.to_q.weight"].T
        kv = torch.cat([keys, queries]) @ w["layers.0.0.to_kv.weight"].T
        k, v = kv[:, : heads * dim_head], kv[:, heads * dim_head :]
        out = []
        for head in range(heads):
            part = slice(head * dim_head, (head + 1) * dim_head)
            scores = (q[:, part] * dim_head**-0.25) @ (k[:, part] * dim_head**-0.25).T
            weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
            out.append(weights / weights.sum(-1, keepdim=True) @ v[:, part])
        latents = latents + torch.cat(out, dim=-1) @ w["layers.0.0.to_out.weight"].T
        inner = layer_norm(latents, w["layers.0.1.0.weight"], w["layers.0.1.0.bias"]) @ w["layers.0.1.1.weight"].T
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        latents = latents + inner @ w["layers.0.1.3.weight"].T
        output = latents @ w["proj_out.weight"].T + w["proj_out.bias"]
        results.append(layer_norm(output, w["norm_out.weight"], w["norm_out.bias"]))
    return torch.stack(results)


def randomised(config: ResamplerConfig) -> Resampler:
    torch.manual_seed(0)
    probe = Resampler(config).double()
    with torch.no_grad():
        for parameter in probe.parameters():  # norms start as the identity: move them, or a swapped norm goes unseen
            parameter.add_(0.3 * torch.randn_like(parameter))
    return probe


def test_resampler_equals_plain_arithmetic():
    config = ResamplerConfig(key_width=10, queries=5, width=12, output_width=7, heads=3, dim_head=4, ff_mult=2)
    probe = randomised(config)
    states = torch.randn(3, 11, 10, dtype=torch.float64)
    expected = by_hand(dict(probe.named_parameters()), states, heads=3, dim_head=4)
    torch.testing.assert_close(probe(states), expected, rtol=1e-12, atol=1e-12)


def test_masked_position_equals_removed_position():
    probe = randomised(ResamplerConfig(10, 5, 12, 7, heads=3, dim_head=4))
    states = torch.randn(2, 6, 10, dtype=torch.float64)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 2] = False
    remaining = torch.cat((states[:, :2], states[:, 3:]), dim=1)
    torch.testing.assert_close(probe(states, mask), probe(remaining), rtol=1e-12, atol=1e-12)


def test_parameters_match_published_probes():
    config = ResamplerConfig(key_width=10, queries=5, width=12, output_width=7, heads=3, dim_head=4, ff_mult=2)
    sizes = {"1": 1, "N": 5, "D": 12, "H": 10, "I": 12, "2I": 24, "M": 24, "O": 7}
    expected = {leaf: tuple(sizes[s] for s in shape.split()) for leaf, shape in LEAVES.items()}
    assert {name: tuple(p.shape) for name, p in Resampler(config).state_dict().items()} == expected


def test_paper_probes_have_published_sizes():
    counts = {}
    with torch.device("meta"):
        for name, tokens, width in (("depth", 576, 1024), ("seg", 576, 1536), ("gen", 1, 1024)):
            counts[name] = sum(p.numel() for p in Resampler(ResamplerConfig(4096, tokens, width, width)).parameters())
    assert counts == {"depth": 8_464_384, "seg": 15_055_872, "gen": 7_875_584}
