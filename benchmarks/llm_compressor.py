"""llm-compressor's side of the comparison: one recipe on one model, run in its own environment.

    python llm_compressor.py MODEL --recipe gptq_w4 --calibration C.npy --held-out H.npy

Prints one line of JSON. Needs torch and llmcompressor (README.md says how to set them up) and
nothing of jaxcomp: the token windows come as NumPy files, so that both sides see the same ones.
"""

import argparse
import json
import math
import os
import sys
import time


def quantized(bits, symmetric, activations=None):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if activations is None:
        weights = QuantizationArgs(
            num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=128
        )
        return {"g": QuantizationScheme(targets=["Linear"], weights=weights)}
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="channel")
    inputs = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy=activations, dynamic=True
    )
    return {"g": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)}


def rtn(bits, symmetric, activations=None):
    from llmcompressor.modifiers.quantization import QuantizationModifier

    groups = quantized(bits, symmetric, activations)
    return QuantizationModifier(config_groups=groups, ignore=["lm_head"])


def gptq(bits, symmetric, order=None):
    from llmcompressor.modifiers.gptq import GPTQModifier

    groups = quantized(bits, symmetric)
    return GPTQModifier(
        config_groups=groups, ignore=["lm_head"], actorder=order, dampening_frac=0.01
    )


def awq(bits):
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(), rtn(bits, False)]


def smoothquant():
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    return [SmoothQuantModifier(smoothing_strength=0.5), rtn(8, True, "token")]


def pruned(name, sparsity_pattern):
    if name == "wanda":
        from llmcompressor.modifiers.pruning import WandaPruningModifier as Modifier
    else:
        from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier as Modifier
    return Modifier(
        sparsity=0.5, mask_structure=sparsity_pattern, targets=["Linear"], ignore=["re:.*lm_head"]
    )


RECIPES = {
    "rtn_w4": lambda: rtn(4, True),
    "rtn_w3": lambda: rtn(3, False),
    "rtn_w2": lambda: rtn(2, False),
    "gptq_w4": lambda: gptq(4, True),
    "gptq_w3": lambda: gptq(3, False),
    "gptq_w2": lambda: gptq(2, False),
    "gptq_w4_activation": lambda: gptq(4, True, "static"),
    "gptq_w3_activation": lambda: gptq(3, False, "static"),
    "gptq_w2_activation": lambda: gptq(2, False, "static"),
    "awq_w4": lambda: awq(4),
    "awq_w3": lambda: awq(3),
    "smoothquant_w8a8": smoothquant,
    "wanda_50": lambda: pruned("wanda", "0:0"),
    "wanda_2_4": lambda: pruned("wanda", "2:4"),
    "sparsegpt_50": lambda: pruned("sparsegpt", "0:0"),
    "sparsegpt_2_4": lambda: pruned("sparsegpt", "2:4"),
}


def without_accelerator(torch):
    """Lets AWQ run on the CPU: it pins memory for an accelerator without asking if there is one."""
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, *_: tensor


def perplexity(torch, model, windows):
    total = count = 0
    with torch.inference_mode():
        for start in range(0, len(windows), 16):
            tokens = torch.from_numpy(windows[start : start + 16]).long()
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="none"
            )
            total += float(losses.double().sum())
            count += losses.numel()
    return math.exp(total / count)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder in Hugging Face layout")
    parser.add_argument("--recipe", required=True, choices=["dense", *RECIPES])
    parser.add_argument("--calibration", required=True, help="(windows, length) integers, .npy")
    parser.add_argument("--held-out", required=True, help="(windows, length) integers, .npy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1, help="windows of a calibration batch")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"

    import datasets
    import llmcompressor
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    calibration, held_out = np.load(options.calibration), np.load(options.held_out)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(options.model)
    wall = cpu = 0.0
    if options.recipe != "dense":
        if options.recipe.startswith("awq"):
            without_accelerator(torch)
        rows = {
            "input_ids": calibration.tolist(),
            "attention_mask": np.ones_like(calibration).tolist(),
        }
        dataset = datasets.Dataset.from_dict(rows)
        recipe = RECIPES[options.recipe]()
        free = options.recipe.startswith("rtn")
        data = (
            {}
            if free
            else {
                "dataset": dataset,
                "num_calibration_samples": len(calibration),
                "max_seq_length": calibration.shape[1],
                "shuffle_calibration_samples": False,
                "batch_size": options.batch_size,
            }
        )
        wall, cpu = time.perf_counter(), time.process_time()
        with open(os.devnull, "w") as silence:
            printed, sys.stdout = sys.stdout, silence
            llmcompressor.oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **data)
            sys.stdout = printed
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    weights = [
        m.weight
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    reply = {
        "recipe": options.recipe,
        "perplexity": perplexity(torch, model.eval(), held_out),
        "wall": wall,
        "cpu": cpu,
        "zeros": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        "versions": {
            "llmcompressor": llmcompressor.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
