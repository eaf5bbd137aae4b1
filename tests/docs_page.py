"""Runs the code blocks of a page of the documentation in order, in the current folder: python docs_page.py PAGE.

What the page may take for granted lies there or is defined: the models and data sets it names, small, by their names;
``model``, ``batch``, ``batches``, ``optimizer``.  Nothing is compiled by Inductor, for which a CPU takes minutes.  A
block of Python that begins with the comment ``# name.py`` is that file; lines of shell that install are left out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B")
MIXTURE = "Qwen/Qwen3-30B-A3B"
BLOCK = re.compile(r"(?:<!-- (?P<mark>\w+) -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S)
INSTALLS = re.compile(r"^(python3 -m venv|.*pip install).*\n?", re.M)
ELSEWHERE = {"tests"}  # the block that runs all this
FEWER = {r"\bfastft finetune\b": "fastft finetune --steps 2 --lower eager"}
EAGER = """
import fastft.rewriter.options as options
options.Options.__init__.__defaults__ = ("eager", *options.Options.__init__.__defaults__[1:])
"""


def write_world() -> None:
    """Models, data and what lets other processes start as this one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from fastft.presets import VOCABULARY, byte_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, num_hidden_layers=2, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    for name in MODELS:
        LlamaForCausalLM(config).save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
    sizes |= {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_hidden_layers=2, vocab_size=VOCABULARY)).save_pretrained(MIXTURE)
    write_rows("roneneldan/TinyStories", [{"text": f"Once upon a time there were {n} cats."} for n in range(40)])
    answers = {"chosen": "By purring.", "rejected": "I cannot say."}
    write_rows("trl-lib/ultrafeedback", [{"prompt": f"How do {n} cats sing? ", **answers} for n in range(40)])
    Path("sitecustomize.py").write_text(EAGER)


def write_rows(name: str, rows: list[dict[str, str]]) -> None:
    Path(name).mkdir(parents=True)
    Path(name, "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def given() -> dict[str, Any]:
    """What every page may use without saying where it is from."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODELS[0])
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
    ids = torch.randint(3, 200, (2, 24))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return {"torch": torch, "model": model, "batch": batch, "batches": [batch] * 3, "optimizer": optimizer}


def run(page: Path) -> int:
    """Run the blocks; how many there were."""
    text = page.read_text(encoding="utf-8")
    names, count = given() | {"__name__": "__main__"}, 0
    for block in BLOCK.finditer(text):
        if block["mark"] in ELSEWHERE:
            continue
        code, line = block["code"], text[: block.start("code")].count("\n") + 1
        print(f"{page.name}:{line}", flush=True)
        count += 1
        if block["language"] == "bash":
            shell(code)
        elif file := re.match(r"# (\w+\.py)\n", code):
            Path(file[1]).write_text(code)
        else:
            if page.name == "README.md":  # whose examples stand each for itself
                names = given()
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
    return count


def shell(code: str) -> None:
    code = INSTALLS.sub("", code.replace(".venv/bin/", ""))
    for pattern, fewer in FEWER.items():
        code = re.sub(pattern, fewer, code)
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-euc", code], check=True, env=os.environ | {"PATH": paths, "PYTHONPATH": os.getcwd()})


if __name__ == "__main__":
    exec(EAGER)
    write_world()
    print(run(Path(sys.argv[1])), "blocks")
