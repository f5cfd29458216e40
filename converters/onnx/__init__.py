"""ONNX graphs written node by node from a network's config; nothing is traced.

The weights of a graph are external data: byte ranges of safetensors files in the folder of the graph.
"""

from .graph_options import GraphOptions
from .writers import WRITERS, graph_ports, write_graph, write_graphs

__all__ = ["WRITERS", "GraphOptions", "graph_ports", "write_graph", "write_graphs"]
