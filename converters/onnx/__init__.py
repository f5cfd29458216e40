"""ONNX graphs written node by node from a network's config; nothing is traced.

``write_graphs`` returns models whose weights are external data: byte ranges of files beside the graph.
"""

from .external_weights import Weight
from .graph_options import GraphOptions
from .writers import WRITERS, graph_ports, write_graph, write_graphs

__all__ = ["WRITERS", "GraphOptions", "Weight", "graph_ports", "write_graph", "write_graphs"]
