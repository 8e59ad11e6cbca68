"""TensorRT as a target: networks written through the API from canonical ops, built for a named architecture."""
