"""Networks as graphs of torch.fx: what is cut in two where the last feature map is, and made faster to train."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from lrface.errors import LrfaceError
from lrface.models.blocks import FaceBackbone, GlobalDepthwise, StridedDepthwise

_CAN_BE_OVERWRITTEN = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)  # whose gradient does not need what they gave


class TracedBackbone(FaceBackbone):
    """A graph from images to embeddings as a backbone.

    ``features`` ends at the last square map of more than one pixel that everything behind it is computed from. A network
    without one is taken as a whole, with the embedding as a map of one pixel.
    """

    body: nn.Module
    output: nn.Module

    def prepared(self, x: Tensor) -> Tensor:
        """RGB float [n, 3, input_size, input_size] in [0, 1] -> what the graph takes."""
        return x

    def features(self, x: Tensor) -> Tensor:
        feature_map = self.body(self.prepared(x))
        return feature_map if self._has_map else feature_map.flatten(1)[:, :, None, None]

    def embed(self, feature_map: Tensor) -> Tensor:
        return (self.output(feature_map) if self._has_map else feature_map).flatten(1)

    def _part(self, network: fx.GraphModule, what: str) -> None:
        """Take over ``network``, in eval mode on the CPU, of images of ``input_size``; see above.

        Raises:
            LrfaceError: ``what`` does not give embeddings [n, d] for n images.
        """
        faster(network)
        shapes = [shapes_of(network, n, self.input_size, what) for n in (2, 3)]
        found = [list(each.values())[-1] for each in shapes]
        if any(
            shape is None or shape[0] != n or len(shape) < 2 or shape[1:].numel() != shape[1]
            for shape, n in zip(found, (2, 3), strict=True)
        ):
            raise LrfaceError(
                f"{what}: its output is of shape {list(found[1] or ())} for 3 images; embeddings are [n, d]"
            )
        self.embedding_size = int(found[0][1])  # type: ignore[index]
        place = last_map(network, shapes[0])
        self._has_map = place is not None
        if place is None:
            self.body, self.output = network, nn.Identity()
            self.feature_channels, self.feature_size = self.embedding_size, 1
            return
        self.body, self.output = parted(network, place)
        shape = shapes[0][place]
        assert shape is not None
        self.feature_channels, self.feature_size = int(shape[1]), int(shape[2])


class Shapes(fx.Interpreter):
    """Runs a network and keeps the shape of each node's tensor, None for what is no tensor."""

    def __init__(self, network: fx.GraphModule):
        super().__init__(network)
        self.found: dict[str, torch.Size | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n.name] = value.shape if isinstance(value, Tensor) else None
        return value


def shapes_of(network: fx.GraphModule, n: int, size: int, what: str) -> dict[str, torch.Size | None]:
    """Shapes by node for ``n`` images, the output's last."""
    runner = Shapes(network)
    try:
        with torch.no_grad():
            runner.run(torch.full((n, 3, size, size), 0.5))
    except Exception as error:  # whatever an operator raises for shapes that it does not take
        reason = str(error).partition("\n")[0][:200]
        raise LrfaceError(
            f"{what} does not take {n} images of {size} x {size} pixels ({reason}); export it with a batch of any size"
        ) from error
    return runner.found


def faster(network: fx.GraphModule) -> None:
    """Activations write into what a layer gave where nobody else reads it; see also
    :class:`~lrface.models.blocks.StridedDepthwise` and :class:`~lrface.models.blocks.GlobalDepthwise`."""
    for part in network.modules():
        if type(part) is nn.Conv2d and part.groups == part.in_channels == part.out_channels > 1:
            if max(part.stride) > 1:
                part.__class__ = StridedDepthwise
            elif part.padding == (0, 0) and min(part.kernel_size) > 1:
                part.__class__ = GlobalDepthwise
    for node in network.graph.nodes:
        if node.op != "call_module" or not node.all_input_nodes:
            continue
        layer, before = network.get_submodule(node.target), node.all_input_nodes[0]
        if not isinstance(layer, (nn.ReLU, nn.ReLU6)) or len(before.users) != 1 or before.op != "call_module":
            continue
        if isinstance(network.get_submodule(before.target), _CAN_BE_OVERWRITTEN):
            layer.inplace = True


def last_map(network: fx.GraphModule, shapes: dict[str, torch.Size | None]) -> str | None:
    """The last node with a square map of more than one pixel that all nodes behind it come from."""
    order = {node: number for number, node in enumerate(network.graph.nodes)}
    images = next(node for node in order if node.op == "placeholder")
    moving = {images}  # what depends on the images
    earliest: dict[fx.Node, int] = {}
    for node in order:
        inputs = [each for each in node.all_input_nodes if each in moving]
        if inputs:
            moving.add(node)
            earliest[node] = min(order[each] for each in inputs)
    reach = len(order)
    for node in reversed(order):
        shape = shapes.get(node.name)
        if (
            node in moving
            and node not in (images,)
            and node.op != "output"
            and reach >= order[node]
            and shape is not None
            and len(shape) == 4
            and shape[2] == shape[3] > 1
        ):
            return node.name
        reach = min(reach, earliest.get(node, reach))
    return None


def parted(network: fx.GraphModule, cut: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The network up to the node ``cut``, and from there on."""
    body, output = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    behind: dict[fx.Node, fx.Node] = {}
    passed = False
    for node in network.graph.nodes:
        if passed:
            # A number that the file shares between both parts is read in both.
            for each in node.all_input_nodes:
                if each not in behind:
                    _again(each, output, behind)
            behind[node] = output.node_copy(node, lambda each: behind[each])
            continue
        copies[node] = body.node_copy(node, lambda each: copies[each])
        if node.name == cut:
            body.output(copies[node])
            behind[node] = output.placeholder("feature_map")
            passed = True
    parts = fx.GraphModule(network, body), fx.GraphModule(network, output)
    for part in parts:
        tidy(part)
    return parts


def tidy(network: fx.GraphModule) -> None:
    """Drop what nothing depends on."""
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()


def _again(node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
    """Copy ``node``, which depends on no image, with what it depends on."""
    for each in node.all_input_nodes:
        if each not in copies:
            _again(each, graph, copies)
    copies[node] = graph.node_copy(node, lambda each: copies[each])
