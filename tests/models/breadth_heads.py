"""Encoders, and heads other than a vocabulary's: classes, rewards, embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.breadth import Case, Made, built, config, sizes, text

BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def labelled(labels: Any) -> list[dict[str, Tensor]]:
    """Text with other labels: a tensor for its rows, or a function of the tokens' labels."""
    return [{**batch, "labels": labels(batch["labels"]) if callable(labels) else labels} for batch in text()]


def bert() -> Made:
    model = config("BertConfig", **sizes("head_dim", "num_key_value_heads"), **BERT, num_labels=3)
    return Made(built(model, "AutoModelForSequenceClassification"), labelled(torch.tensor([0, 2])))


def modernbert() -> Made:
    model = config(
        "ModernBertConfig", **sizes("num_key_value_heads", "head_dim"), cls_token_id=1, sep_token_id=2, num_labels=3,
        local_attention=16,
    )  # fmt: skip
    return Made(
        built(model, "AutoModelForTokenClassification"), labelled(lambda ids: torch.where(ids < 0, ids, ids % 3))
    )


def reward() -> Made:
    model = built(config("LlamaConfig", **sizes(), num_labels=1), "AutoModelForSequenceClassification")
    return Made(model, labelled(torch.tensor([0.5, 1.5])))


def token_classes() -> Made:
    model = built(config("Qwen3Config", **sizes()), "AutoModelForTokenClassification")
    return Made(model, labelled(lambda ids: torch.where(ids < 0, ids, ids % 2)))


class Embedder(nn.Module):
    """The mean over a text's tokens of what the last layer makes of them, of length one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def contrastive(embeddings: Tensor) -> Tensor:
    """Of each query, its own passage among all of the batch: the queries are the first half of the rows."""
    queries, passages = embeddings.chunk(2)
    return F.cross_entropy(queries @ passages.T / 0.05, torch.arange(len(queries), device=queries.device))


def embeddings(name: str, **settings: Any) -> Made:
    model = Embedder(built(config(name, **settings), "AutoModel"))
    batches = [
        {key: torch.cat([batch[key], batch[key].flip(0).roll(1, -1)]) for key in ("input_ids", "attention_mask")}
        for batch in text()
    ]
    for batch in batches:
        batch["attention_mask"][:, 0] = 1
    return Made(model, batches, contrastive)


HEADS = (
    Case("BERT, classes of texts", bert, ops="layer_norm attention"),
    Case(  # its first layer lacks a norm, and its last attends to all tokens
        "ModernBERT, classes of tokens", modernbert, ops="layer_norm rotary attention glu", shared=2
    ),
    Case("Llama, a reward", reward),
    Case("Qwen3, classes of tokens", token_classes),
    Case("Qwen3, embeddings and a contrastive loss outside", lambda: embeddings("Qwen3Config", **sizes())),
    Case(
        "BERT, embeddings and a contrastive loss outside",
        lambda: embeddings("BertConfig", **sizes("head_dim", "num_key_value_heads"), **BERT),
        ops="layer_norm attention",
    ),
)  # fmt: skip
