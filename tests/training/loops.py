"""Training loops that people write themselves."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.setting import FEW, LENGTH, Setting, adapter, batch, norm_of_gradients, trained

STEPS, RATE = 4, 1e-2


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=RATE)


def step(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Backward and the optimizer; the loss, and the norm of its gradients."""
    loss.backward()
    seen = [loss.item(), norm_of_gradients(model)]
    optimizer.step()
    optimizer.zero_grad()
    return seen


def train(setting: Setting, model: Any, compiled: Any, *, steps: int = STEPS, optimizer: Any = None) -> list[float]:
    """The plainest loop."""
    optimizer = optimizer or optimizer_of(model)
    return [number for each in setting.batches(steps) for number in step(compiled(**each).loss, model, optimizer)]


def plain(setting: Setting) -> list[float]:
    """Plain PyTorch, LoRA on all projections"""
    model = setting.model(lora="all-linear")
    return train(setting, model, setting.compile(model))


def full(setting: Setting) -> list[float]:
    """Plain PyTorch, all weights trained"""
    model = setting.model(lora=None)
    return train(setting, model, setting.compile(model))


def qlora(setting: Setting) -> list[float]:
    """Plain PyTorch, 4-bit weights and LoRA on all projections"""
    model = setting.model(lora="all-linear", nf4=True)
    return train(setting, model, setting.compile(model))


def in_place(setting: Setting) -> list[float]:
    """`model.compile(backend="fastft")`"""
    model = setting.model()
    return train(setting, model, setting.compile_in_place(model))


def pure_bf16(setting: Setting) -> list[float]:
    """All of it in bfloat16"""
    model = setting.model(dtype=torch.bfloat16)
    return train(setting, model, setting.compile(model))


def checkpointed(setting: Setting) -> list[float]:
    """`gradient_checkpointing_enable()`"""
    model = setting.model()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return train(setting, model, setting.compile(model))


def accumulation(setting: Setting) -> list[float]:
    """Gradient accumulation, the mean of micro-batches"""
    model = setting.model()
    compiled, optimizer, seen = setting.compile(model), optimizer_of(model), []
    for step, each in enumerate(setting.batches(2 * STEPS)):
        loss = compiled(**each).loss / 2
        loss.backward()
        seen.append(loss.item())
        if step % 2:
            seen.append(norm_of_gradients(model))
            optimizer.step()
            optimizer.zero_grad()
    return seen


def accumulation_by_tokens(setting: Setting) -> list[float]:
    """Gradient accumulation with `num_items_in_batch`, micro-batches of two lengths"""
    model = setting.model()
    compiled, optimizer, seen = setting.compile(model), optimizer_of(model), []
    for step in range(STEPS):
        parts = [batch(2 * step, 2, LENGTH, setting.device), batch(2 * step + 1, 2, LENGTH // 2, setting.device)]
        count = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
        for part in parts:
            loss = compiled(**part, num_items_in_batch=count).loss
            loss.backward()
            seen.append(loss.item())
        seen.append(norm_of_gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def fp16(setting: Setting) -> list[float]:
    """float16 autocast with GradScaler, the first scale too large"""
    model = setting.model(rounded=torch.float16)
    compiled, optimizer, seen = setting.compile(model), optimizer_of(model), []
    scaler = torch.amp.GradScaler(setting.device, init_scale=2.0**24)
    for each in setting.batches(STEPS + 4):
        with torch.autocast(setting.device, torch.float16):
            loss = compiled(**each).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen += [loss.item(), scaler.get_scale() / 2.0**24]
    return seen


def bf16_autocast(setting: Setting) -> list[float]:
    """bfloat16 autocast"""
    model = setting.model(rounded=torch.bfloat16)
    compiled = setting.compile(model)

    def forward(**each: Tensor) -> Any:
        with torch.autocast(setting.device, torch.bfloat16):
            return compiled(**each)

    return train(setting, model, forward)


def clipping(setting: Setting) -> list[float]:
    """Gradient clipping and a schedule of the learning rate"""
    model = setting.model()
    compiled, optimizer, seen = setting.compile(model), optimizer_of(model), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    for each in setting.batches(STEPS):
        loss = compiled(**each).loss
        loss.backward()
        seen += [loss.item(), nn.utils.clip_grad_norm_(trained(model), 0.05).item()]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return seen


def submodules(setting: Setting) -> list[float]:
    """`torch.compile` of each layer"""
    model = setting.model()
    layers = model.get_base_model().model.layers
    for layer in layers:
        setting.compile_in_place(layer)
    return train(setting, model, model)


def decoder(setting: Setting) -> list[float]:
    """`torch.compile` of the decoder, head and loss outside"""
    model = setting.model()
    setting.compile_in_place(model.get_base_model().model)
    return train(setting, model, model)


def whole_step(setting: Setting) -> list[float]:
    """`torch.compile` of the whole step, optimizer included"""
    model = setting.model()
    optimizer = optimizer_of(model)

    def whole(each: dict[str, Tensor]) -> Tensor:
        loss = model(**each).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    compiled = setting.compile(whole)
    return [compiled(each).item() for each in setting.batches(STEPS)]


def loss_in_function(setting: Setting) -> list[float]:
    """`torch.compile` of a function that has the loss, logits computed in the model"""
    model = setting.model()

    def loss_of(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1))

    compiled = setting.compile(loss_of)
    optimizer = optimizer_of(model)
    return [number for each in setting.batches(STEPS) for number in step(compiled(**each), model, optimizer)]


def closures(setting: Setting) -> list[float]:
    """LBFGS, which calls a closure several times a step"""
    model = setting.model()
    compiled, seen = setting.compile(model), []
    optimizer = torch.optim.LBFGS(trained(model), lr=0.01, max_iter=3)
    for each in setting.batches(2):

        def closure(each: dict[str, Tensor] = each) -> Tensor:
            optimizer.zero_grad()
            loss = compiled(**each).loss
            loss.backward()
            seen.append(loss.item())
            return loss

        optimizer.step(closure)
    return seen


def averages(setting: Setting) -> list[float]:
    """An exponential average of the weights, evaluated in between"""
    model = setting.model()
    compiled = setting.compile(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer, seen = optimizer_of(model), []
    for each in setting.batches(STEPS):
        loss = compiled(**each).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        with torch.no_grad():
            seen += [loss.item(), average(**each).loss.item()]
    return seen


def averages_of_compiled(setting: Setting) -> list[float]:
    """A copy of the compiled model (`copy.deepcopy`) that follows its weights"""
    model = setting.model()
    compiled = setting.compile(model)
    seen = train(setting, model, compiled, steps=2)
    average = copy.deepcopy(compiled)
    for _ in range(2):
        seen += train(setting, model, compiled, steps=1)
        with torch.no_grad():
            for mine, other in zip(average.parameters(), model.parameters(), strict=True):
                if other.requires_grad:
                    mine.lerp_(other, 0.5)
            seen.append(average(**batch(9, device=setting.device)).loss.item())
    return seen


def log_probabilities(model: Any, each: dict[str, Tensor]) -> Tensor:
    """Of each row's labels, as DPO's own code takes them."""
    labels = each["labels"][:, 1:]
    logits = model(input_ids=each["input_ids"], attention_mask=each["attention_mask"]).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (chosen * (labels != -100)).sum(-1)


def two_models(setting: Setting) -> list[float]:
    """DPO by hand: a policy and a reference, both compiled"""
    model, frozen = setting.model(), setting.model().requires_grad_(False).eval()
    policy, reference = setting.compile(model), setting.compile(frozen)
    optimizer, seen = optimizer_of(model), []
    for each in setting.batches(STEPS, rows=4):
        with torch.no_grad():
            before = log_probabilities(reference, each)
        better, worse = (log_probabilities(policy, each) - before).chunk(2)
        seen += step(-F.logsigmoid(0.1 * (better - worse)).mean(), model, optimizer)
    return seen


def evaluating(setting: Setting) -> list[float]:
    """Evaluation and `generate` between steps"""
    model = setting.model()
    compiled = setting.compile(model)
    seen: list[float] = []
    for _ in range(2):
        seen += train(setting, model, compiled, steps=2)
        compiled.eval()
        with torch.no_grad():
            seen.append(compiled(**batch(7, device=setting.device)).loss.item())
        prompt = batch(8, device=setting.device)["input_ids"][:, :6]
        with torch.inference_mode():
            tokens = compiled.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
        seen += tokens[:, 6:].float().flatten().tolist()
        compiled.train()
    return seen


def resuming(setting: Setting) -> list[float]:
    """A checkpoint of model and optimizer, loaded into a new model"""
    path = setting.folder / "checkpoint.pt"
    seen: list[float] = []
    for start in (0, 2):
        model = setting.model()
        compiled, optimizer = setting.compile(model), optimizer_of(model)
        if start:
            state = torch.load(path, weights_only=True)
            compiled.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        for number in range(start, start + 2):
            seen += step(compiled(**batch(number, device=setting.device)).loss, model, optimizer)
        torch.save({"model": compiled.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return seen


def adapters(setting: Setting) -> list[float]:
    """Adapters added, switched, switched off, merged and unloaded after compilation"""
    model = setting.model()
    compiled = setting.compile(model)
    seen = train(setting, model, compiled, steps=1)
    torch.manual_seed(2)
    model.add_adapter("other", adapter(r=2, target_modules=FEW))
    model.set_adapter("other")
    seen += train(setting, model, compiled, steps=1)
    model.set_adapter("default")
    seen += train(setting, model, compiled, steps=1)
    each = batch(5, device=setting.device)
    with model.disable_adapter(), torch.no_grad():
        seen.append(compiled(**each).loss.item())
    with torch.no_grad():
        model.merge_adapter()
        seen.append(compiled(**each).loss.item())
        model.unmerge_adapter()
        seen.append(compiled(**each).loss.item())
    seen += train(setting, model, compiled, steps=1)
    whole = model.merge_and_unload().requires_grad_(True)
    return seen + train(setting, whole, setting.compile(whole), steps=2)


LOOPS: Sequence[Any] = (
    plain, full, qlora, in_place, checkpointed, pure_bf16, bf16_autocast, fp16, accumulation, accumulation_by_tokens,
    clipping, submodules, decoder, loss_in_function, whole_step, closures, averages, averages_of_compiled, two_models,
    evaluating, resuming, adapters,
)  # fmt: skip
