"""Tracing a Llama-3-70B-shaped model from shapes alone: seconds and memory.

python -m benchmarks.trace
"""

import resource
import time

import jax
import jax.numpy as jnp

import jaxcomp as jc
from jaxcomp.models import LlamaConfig, build


def main() -> None:
    """Prints one table."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    )
    print("| layers | sites | build s | trace s | peak MB |")
    print("| --- | --: | --: | --: | --: |")
    for scan in (False, True):
        start = time.perf_counter()
        apply, params = jc.functional(build(config, scan=scan, dtype=jnp.bfloat16))
        built = time.perf_counter()
        graph = jc.trace(apply, params, jax.ShapeDtypeStruct((1, 2048), jnp.int32))
        done = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        layers = "scanned" if scan else "unrolled"
        times = f"{built - start:.1f} | {done - built:.1f}"
        print(f"| {layers} | {len(graph.sites)} | {times} | {peak:.0f} |")


if __name__ == "__main__":
    main()
