"""`python -m bench.datatypes`: perplexity by data type of the weights (the table of QLoRA, section 4), on a real model.

Only the layers' linear weights are in the data type: embedding, tied head and norms stay as they are, and bits a weight
are those of the linear weights with their scales. Arithmetic is fp32 in every row but the one called bf16, so rows
differ by their weights alone. The error of a weight is against the weights as stored: SmolLM2's file is in Q4_1 itself
(blocks of 32, 16 even steps), which was rounded once before.

A comparison at one seed of a trained adapter was rejected: it would measure the seed.
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WINDOW, TOKENS, BATCH = 512, 32768, 4
ROWS = {  # name: dtype of the arithmetic, and what the linear weights are quantised to
    "fp32": ("float32", None),
    "bf16": ("bfloat16", None),
    "int8, a scale a row": ("float32", {"kind": "int8"}),
    "NF4": ("float32", {"double_quant": False}),
    "NF4 + double quantisation": ("float32", {}),
    "NF4 + double, blocks of 128": ("float32", {"block_size": 128}),
    "NF4 + double, blocks of 256": ("float32", {"block_size": 256}),
    "FP4": ("float32", {"kind": "fp4", "double_quant": False}),
    "FP4 + double quantisation": ("float32", {"kind": "fp4"}),
}


def weight_error(model: Any, stored: dict[str, Any]) -> dict[str, float]:
    """Return bits a weight, the mean squared error and its share of the weights' mean square, over linear layers.

    Args:
        model: of any data type.
        stored: the weights as stored, fp32, by the layer's path.
    """
    from minitune.model.lora import linear_modules
    from minitune.ops.nf4 import QuantizedTensor

    count = bits = error = power = 0.0
    for path, layer in linear_modules(model).items():
        weight, truth = layer.stored_weight, stored[path]
        quantised = isinstance(weight, QuantizedTensor)
        bits += 8 * weight.nbytes
        values = weight.dequantize(truth.dtype) if quantised else weight.detach().to(truth.dtype)
        count += truth.numel()
        error += float((values - truth).double().square().sum())
        power += float(truth.double().square().sum())
    return {"bits": bits / count, "squared_error": error / count, "relative_error": error / power}


def measure(path: Path, text: str, dtype: str, options: dict[str, Any] | None, stored: dict[str, Any]) -> dict:
    """Return one row: perplexity, bits a weight, errors, seconds; with options None and fp32, fills `stored`."""
    from minitune.checkpoint.load import load_model, load_tokenizer
    from minitune.evaluation.perplexity import perplexity
    from minitune.model.config import QuantizationConfig
    from minitune.model.lora import linear_modules

    began = time.monotonic()
    quantize = None if options is None else QuantizationConfig(**options)
    model = load_model(path, dtype=dtype, quantize=quantize, keep_quantized=False)
    if not stored:
        stored |= {name: layer.stored_weight.detach() for name, layer in linear_modules(model).items()}
    row = weight_error(model, stored)
    score = perplexity(model, load_tokenizer(path), text, window=WINDOW, max_tokens=TOKENS, batch_size=BATCH)
    row |= {"perplexity": score.perplexity, "loss": score.loss, "tokens": score.tokens}
    return row | {"seconds": round(time.monotonic() - began, 1)}


def table(results: dict[str, Any]) -> str:
    """Return the rows as aligned text, perplexity also as the change against fp32."""
    base = results["rows"]["fp32"]["perplexity"]
    lines = [f"{'weights':30}{'bits':>7}{'perplexity':>12}{'against fp32':>14}{'squared error':>15}{'relative':>10}"]
    for name, row in results["rows"].items():
        change = row["perplexity"] / base - 1
        lines.append(
            f"{name:30}{row['bits']:7.3f}{row['perplexity']:12.3f}{change:>+14.2%}{row['squared_error']:15.2e}"
            f"{row['relative_error']:>10.3%}"
        )
    lines.append(f"{results['model']}, {results['text']}: {results['tokens']:,} tokens, window {WINDOW}; "
                 f"{results['date']}, torch {results['torch']}")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure all rows, print the table, write the JSON; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.datatypes", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a fetched model, a folder or a .gguf file")
    parser.add_argument("--text", type=Path, help="what is scored (default: wiki_demo.txt, fetched)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "datatypes.json")
    options = parser.parse_args(argv)
    import torch

    from minitune.sources import fetch

    torch.set_num_threads(options.threads)
    path = Path(options.model) if os.path.exists(options.model) else fetch(options.model)
    source = options.text or fetch("wiki-demo")
    text = source.read_text(encoding="utf-8")
    results = {"date": f"{datetime.date.today()}", "model": options.model, "text": source.name, "window": WINDOW,
               "torch": torch.__version__, "threads": options.threads, "rows": {}}  # fmt: skip
    stored: dict[str, Any] = {}
    for number, (name, (dtype, quantization)) in enumerate(ROWS.items(), 1):
        row = results["rows"][name] = measure(path, text, dtype, quantization, stored)
        results["tokens"] = row["tokens"]
        done = f"[{number}/{len(ROWS)}] {name}: {row['perplexity']:.3f} ({row['seconds']} s)"
        print(done, file=sys.stderr, flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
