"""Bytes of a base's weights, whole or quantized."""

from __future__ import annotations

from trsr_dist.planning.shape import ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a number."""
QUANTIZED_BITS = {"4bit": 4 + 8 / 64 + 32 / (64 * 256), "8bit": 8.0}
"""Of a weight in a linear module. NF4 with double quantization (arXiv 2305.14314): an 8-bit scale for 64 weights, and a
float32 one for 256 of these. LLM.int8 (arXiv 2208.07339): its scale of a row is not counted."""


def weight_bytes(shape: ModelShape, precision: str, quantization: str = "none") -> int:
    """All weights of the base.

    Args:
        shape: the base model.
        precision: of what is not quantized: embeddings, output head, norms, biases.
        quantization: of the linear modules of the layers; ``none``, ``4bit`` or ``8bit``.
    """
    if quantization == "none":
        return shape.num_parameters * BYTES[precision]
    linear = shape.num_linear_parameters
    quantized = round(linear * QUANTIZED_BITS[quantization] / 8)
    return quantized + (shape.num_parameters - linear) * BYTES[precision]
