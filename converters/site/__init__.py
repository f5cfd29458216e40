"""A static website that generates images in the browser, from a bundle: its networks on onnxruntime-web, and a page."""
