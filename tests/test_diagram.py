"Diagrams are made of what ran: every parameter once, no way back, skips between equal resolutions"
import xml.etree.ElementTree as ET

import pytest
import torch
import torch.nn.functional as F
from test_zoo import SMALL
from torch import nn

from synseg.check import count_parameters
from synseg.diagram import describe, draw_network, network_svg, place
from synseg.unet import UNet
from synseg.wiring import Edge, trace_network
from synseg.zoo import create_model, list_models


def narrow(name):
    with torch.device("meta"):
        return create_model(name, 5, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", list_models())
def test_every_network_is_drawn(name):
    model = narrow(name)
    graph = trace_network(model, (188, 188) if name == "unet_valid" else (128, 192))
    assert graph.parameters + graph.idle == count_parameters(model) and graph.idle == 0
    assert all(e.source < e.target for e in graph.edges), "an edge leads backward"
    assert {e.target for e in graph.edges} == set(range(1, len(graph.nodes))), "a node is fed by nobody"
    assert {e.source for e in graph.edges} == {i for i, n in enumerate(graph.nodes) if n.kind != "logits"}, "a node feeds nobody"
    assert graph.nodes[0].kind == "image" and graph.nodes[-1].kind == "logits" and graph.nodes[-1].channels == 5
    spots, _ = place(graph)
    for i, a in enumerate(spots):
        for b in spots[:i]:
            assert abs(a.x - b.x) >= (a.w + b.w) / 2 - 1e-9 or abs(a.y - b.y) >= (a.h + b.h) / 2 - 1e-9, "two boxes overlap"
    assert all(spots[e.source].x < spots[e.target].x for e in graph.edges)
    svg = ET.fromstring(network_svg(graph))
    assert svg.find("{*}desc").text == describe(graph) and len(svg.findall("{*}path")) == len(graph.edges)


@pytest.mark.parametrize("depth, size", [(1, (64, 64)), (3, (97, 131)), (4, (256, 128))])
def test_skips_of_unet_join_equal_resolutions(depth, size):
    graph = trace_network(UNet(3, width=4, depth=depth), size)
    skips = [e for e in graph.edges if e.target - e.source > 1]
    assert len(skips) == depth and all(graph.nodes[e.source].channels == graph.nodes[e.target].channels for e in skips)
    stride = lambda i: round(graph.stride(graph.nodes[i]), 1)
    assert all(stride(e.source) == stride(e.target) for e in skips)
    assert not [e for e in trace_network(UNet(3, width=4, depth=depth, skips=False), size).edges if e.target - e.source > 1]


class Odd(nn.Module):
    "An ignored argument, a shared module, a map written into another, an in-place sum"
    def __init__(self, use=False):
        super().__init__()
        self.a, self.b, self.use = nn.Conv2d(3, 4, 3, padding=1), Ignores(use), use

    def forward(self, x):
        first = self.a(x)
        second = self.b(F.max_pool2d(first, 2), first)
        third = self.b(second, first)
        third += second
        canvas = torch.zeros(x.shape[0], 4, *x.shape[-2:], device=x.device)
        canvas[..., ::2, ::2] = third
        return canvas


class Ignores(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.conv, self.use = nn.Conv2d(4, 4, 3, padding=1), use

    def forward(self, x, y): return self.conv(x) + (y.mean() if self.use else 0)


@pytest.mark.parametrize("use", [False, True])
def test_what_is_ignored_does_not_feed(use):
    model = Odd(use)
    graph = trace_network(model, (32, 32))
    assert [n.name for n in graph.nodes] == ["image", "a", "b", "b", "add", "logits"] and graph.parameters == count_parameters(model)
    assert (Edge(1, 3) in graph.edges) == use and Edge(2, 4) in graph.edges
    assert [n.parameters for n in graph.nodes if n.name == "b"] == [148, 0]


def test_the_model_is_left_alone():
    model = UNet(2, width=4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    draw_network(model, (64, 64))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert network_svg(model, (64, 64)) == network_svg(UNet(2, width=4), (64, 64)) != network_svg(UNet(2, width=4, depth=3), (64, 64))


def test_what_the_network_refuses_is_refused():
    with pytest.raises(ValueError, match="needs at least"): draw_network(UNet(2, width=4), (32, 32))
    with pytest.raises(ValueError): trace_network(narrow("unet_valid"), (200, 200))
