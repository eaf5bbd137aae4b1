"""bitsandbytes' paged optimizers on a full card: their states move to the host's memory, and the step is right."""

from collections.abc import Iterable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LEFT_BYTES = 2**27  # free on the card while the optimizer steps
VOCABULARY, HIDDEN = 2**20, 64  # an embedding of 256 MiB, whose states do not fit into what is left

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def stepped(make: Any, *, full: bool) -> tuple[Tensor, int]:
    """The embedding after a step, and the bytes that the step took on the device."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config).cuda().train()
    optimizer = make(model.parameters(), lr=1e-3)
    ids = torch.randint(1, 5000, (2, 64), device="cuda")
    torch.compile(model, backend="fastft", options={"lower": "eager"})(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    ballast = torch.empty(free - LEFT_BYTES if full else 0, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_allocated()
    try:
        optimizer.step()
        torch.cuda.synchronize()
        return model.get_input_embeddings().weight.detach()[:5000].cpu(), torch.cuda.memory_allocated() - before
    finally:
        del ballast
        torch.cuda.empty_cache()


@pytest.mark.parametrize("bits", ["8bit", "32bit"])
def test_states_leave_a_full_card(bits: str) -> None:
    optimizers = bitsandbytes.optim
    plain, paged = getattr(optimizers, f"AdamW{bits}"), getattr(optimizers, f"PagedAdamW{bits}")
    expected, _ = stepped(plain, full=False)
    if bits == "32bit":  # 512 MiB of states; those of 8 bits fit
        with pytest.raises(torch.OutOfMemoryError):
            stepped(plain, full=True)
    found, taken = stepped(paged, full=True)
    assert taken < 2**24
    torch.testing.assert_close(found, expected)


def test_an_unpaged_state_is_on_the_card() -> None:
    """So that taking nothing there means something."""

    def make(values: Iterable[Tensor], lr: float) -> Any:
        return bitsandbytes.optim.AdamW8bit(values, lr=lr)

    assert stepped(make, full=False)[1] > 2**26
