"""What a user can change, by the code of fastft's reasons and by the words of Dynamo's."""

from __future__ import annotations

import re

from fastft.reasons import Reason

ADVICE = {  # by code
    "attention.dropout": "set attention_dropout before compiling, to one number for all layers",
    "dora.dropout": "lora_dropout=0 in LoraConfig: DoRA is then one product with the layer's own",
    "dtype.float64": "train in float32 or less: the ops round to float32 inside",
    "experts.added": "leave the parameters of modules that are not transformers' experts out of target_parameters",
    "experts.left": "nothing: it is computed as the model has it",
    "logits.used": "take the loss from the model, by labels=..., or use the logits for the loss alone",
    "lora.variant": "plain LoRA and DoRA in LoraConfig: other variants are left to Inductor",
    "mask.data": "pass the attention_mask with two axes, or position_ids, and let the model build its mask",
    "mask.per_head": "nothing: a number for each head, query and key stays in memory, as in the model's own code",
    "mask.trained": "nothing: it stays a tensor of numbers, as in the model's own code, and so does its gradient",
    "match.returned": (
        "do not ask for hidden states or attentions, and take hooks that keep what a module computes off it"
    ),
    "mode.switched": "put autocast around the call of the whole model",
    "mutation": "write x = x + y in place of x += y",
    "number.item": "set it before compiling, to one number for all layers",
    "rows.labels": "pass labels to the model, or set options={'skip_padding': True} if your loss never counts padding",
    "rows.mask": "let the model build its masks from an attention_mask with two axes, or from position_ids",
    "rows.mixed": "nothing, if what mixes tokens is the model's own; else leave it out of the layers",
    "rows.returned": "do not ask for hidden states or attentions, and set use_cache=False",
    "rows.sizes": "leave dynamic=False and mark_static off, so that one graph is for any batch and length",
    "rows.unshared": "leave dropout off, and share_prefixes too where it is needed",
    "rows.unmasked": "pass an attention_mask, or options={'skip_padding': True} to drop what follows the last label",
    "weight.dequantized": "call a 4-bit layer by its forward alone, and do not shard its weights (ignored_params)",
}
_OF_DYNAMO = (  # graph breaks and recompilations, in torch's words; the first that is found
    (
        r"requires_grad_?\(\)|requires_grad` through",
        "gradient checkpointing asked for this: leave gradient_checkpointing off, as the memory budget recomputes what "
        "it has to",
    ),
    (r"`print`|Logger|logging\.", "take it out of forward, or run it only if not torch.compiler.is_compiling()"),
    (
        r"Tensor\.item\(\)|data-dependent|Data-dependent|dependent on the data|depends on input Tensor data",
        "keep the number on the device, by torch.where say, or compute it outside the model; what comes behind it, "
        "such as a decoder behind a tower for images, is a graph of its own all the same",
    ),
    (
        r"size mismatch|shape mismatch",
        "pad to a few lengths, by pad_to_multiple_of say, or pack: two lengths make one graph for all",
    ),
    (
        r"requires_grad mismatch|GLOBAL_STATE|grad_mode",
        "training and evaluation are compiled apart, once each: nothing to do",
    ),
)


def advice(reason: str) -> str:
    """Return what to do about a reason, without a full stop; "" where nothing is known to help."""
    if isinstance(reason, Reason):
        return ADVICE[reason.code]
    return next((text for pattern, text in _OF_DYNAMO if re.search(pattern, reason)), "")


def with_advice(reason: str) -> str:
    """Return the reason, with what to do about it on a line of its own."""
    text = advice(reason)
    return f"{reason}\n→ {text}" if text else reason
