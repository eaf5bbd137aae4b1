"""How long is a fine-tuning step, and how much memory does it take?

A step is forward, loss, backward and AdamW on the LoRA factors (r=16 on all seven projections) of a model with random
weights.  Each contender runs at each batch and length in a process of its own, with empty compile caches.

    pip install --no-deps --no-build-isolation -e .     # once; without it the checkout is used as it lies
    python benchmarks/step.py --model tiny --batches 1x32 --device cpu --lower eager
    python benchmarks/step.py --model llama-1b --batches 4x2048,1x512
    python benchmarks/step.py --model llama-8b --nf4 --batches 1x2048,2x2048,8x2048 --json rows.json --png steps.png
    python benchmarks/step.py --model llama-8b --nf4 --layers 4 --contenders inductor,fastft --batches 2x2048
    python benchmarks/step.py --model llama-8b --nf4 --as-trainer --lengths 256-2048 --batches 2x2048 --steps 20
    python benchmarks/step.py --contenders inductor,fastft,fastft-whole,fastft-min,fastft-graphs
    for mask in none packed; do python benchmarks/step.py --mask $mask --turns /tmp/turns --json $mask.json & done; wait
    python benchmarks/report.py rows.json more.json --png steps.png      # show rows again, or several files together

Run it as a file, not with -m: from the root, ``kernels`` would shadow the package of that name.

What is measured: seconds from step to step, 20th, 50th and 80th percentile after the warm-up, between CUDA events and
without a wait in each step; tokens/s at the median; the first step, compilation included (cold unless --warm-cache);
peak memory of tensors over all steps (on a CPU: the process's peak resident size, which the compiler dominates).  The
loss and gradient norm of the last step are there to compare contenders by: they see the same weights and batches.
On CUDA, after all that: the host's time to issue a step, and the share of a step's time in which the GPU works (see
occupancy.py); a host time near the step's, with the GPU idle between, is a step bound by launches.

With --turns what takes longest, compiling, is done side by side; all models are in memory together, first steps are not
to be compared, and the time that a process waits counts for its --timeout.

What a user would write: ids, labels and an all-ones attention_mask, as a tokenizer returns them; use_cache off, as in
Trainer; base model in --dtype, LoRA factors in float32, no autocast.  The base of --nf4 is double-quantised and not
passed through prepare_model_for_kbit_training, so norms, embeddings and head stay in --dtype.  Checkpointing is
non-reentrant, every layer.

--mask none leaves the attention_mask out.  padded: the last quarter of every row but the first, or of the only one, is
padding, without labels.  packed: no attention_mask, but position_ids that begin again every 512 tokens (a quarter of a
row, where that is less), as a collator without padding makes them, and no label for the first token of a document.
tokens/s count the tokens of the batch as they are, padding included.

--as-trainer steps as transformers' Trainer does with bf16=True, optim="paged_adamw_8bit" and a progress bar: forward
under autocast, bitsandbytes' PagedAdamW8bit, and each loss read.  --lengths 256-2048 gives each row a length of its own
and pads to the longest of its batch, on the right, without labels, as a collator does; --batches then says how many
rows, and 2048 their bound.  tokens/s are those of all timed batches in all their time (--warmup does not count), and a
row has the share of padding, tokens/s without it, and the seconds of each step of the warm-up.  With --median 250 the
lengths are log-normal about 250, as those of instructions are: --lengths 16-2048 then says where they are cut off.
With --max-length every batch is padded up to the bound, as a tokenizer's padding="max_length" does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import arguments
import report
import workers
from contenders import MAIN


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.common(__doc__)
    add = parser.add_argument
    contenders = arguments.listed(arguments.contender)
    add("--contenders", type=contenders, default=list(MAIN), help="comma-separated; ratios are to the first")
    shapes = arguments.listed(arguments.shape)
    add("--batches", type=shapes, default=[(1, 2048)], help="batch x length, as in 4x2048,1x512")
    add("--layers", type=arguments.positive, help="cut the model to this many layers")
    add("--steps", type=arguments.positive, default=10, help="timed steps (default 10)")
    add("--warmup", type=arguments.positive, default=3, help="steps before them, the first included (default 3)")
    add("--warm-cache", action="store_true", help="keep using the machine's compile caches")
    add("--turns", help="a file: of commands that name the same one, started together, each is timed alone")
    add("--png", type=Path, help="draw the rows here")
    add("--as-trainer", action="store_true", help="autocast, a paged 8-bit optimizer, and the loss read in each step")
    add("--median", type=arguments.positive, help="the lengths of --lengths are log-normal about this one")
    add("--lengths", type=arguments.span, help="each row has a length between these, as in 256-2048")
    add("--max-length", action="store_true", help="pad every batch of --lengths up to their bound")
    options = parser.parse_args(words)
    if options.lengths:
        options.batches = [(batch, options.lengths[1]) for batch, _ in options.batches]
    return options


def main() -> None:
    options = parse()
    rows = workers.run_all("measure", jobs, options)
    report.show(rows)
    if options.png:
        report.draw(rows, options.png)


def jobs(options: argparse.Namespace, scratch: Path) -> list[workers.Job]:
    """Every contender at every shape."""
    pairs = [(name, shape) for shape in options.batches for name in options.contenders]
    made = []
    for i, (name, (batch, length)) in enumerate(pairs):
        asked = arguments.asked(
            options, "layers", "steps", "warmup", "turns", "as_trainer", "lengths", "median", "max_length"
        )
        asked |= {"contender": name, "batch": batch, "length": length}
        caches = None if options.warm_cache else scratch / f"caches-{i}"
        made.append(workers.Job(f"{name} {batch}x{length}", asked, caches))
    return made


if __name__ == "__main__":
    main()
