"""What reads a model's logits in practice: generation, and accelerate between a model and a training loop."""

import torch
from accelerate import Accelerator
from accelerate.utils.operations import convert_to_fp32
from transformers import LlamaConfig, LlamaForCausalLM

from fastft.rewriter.runtime.lazy_logits import LazyLogits

OPTIONS = {"lower": "eager", "strict": True}


def build() -> LlamaForCausalLM:
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=131, num_hidden_layers=2, head_dim=8, **sizes))


def test_generation() -> None:
    model, ids = build().eval(), torch.randint(3, 131, (2, 6))
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **asked)
    model.forward = torch.compile(model.forward, backend="fastft", options=OPTIONS)
    assert torch.equal(model.generate(ids, **asked), expected)


def test_accelerate() -> None:
    model, ids = build(), torch.randint(3, 131, (2, 6))
    own = model(input_ids=ids, labels=ids)
    output = torch.compile(model, backend="fastft", options=OPTIONS)(input_ids=ids, labels=ids)
    accelerator = Accelerator(cpu=True)
    assert type(convert_to_fp32(output).logits) is LazyLogits  # as its autocast does to every output: nothing is read
    torch.testing.assert_close(accelerator.gather_for_metrics(output.logits), own.logits)
    torch.testing.assert_close(accelerator.pad_across_processes(output.logits, dim=1), own.logits)
    torch.testing.assert_close(output.loss, own.loss)
