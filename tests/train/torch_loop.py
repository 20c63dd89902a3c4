"""The reference: a plain training loop of transformers and torch."""

import importlib

import numpy as np
import torch
import transformers


def five_steps(ours, theirs, make):
    """Of ours and a `Loop`, whose losses are compared: after each step (number, ours, theirs) of gradients and parameters."""
    for seed in range(5):
        batch = make(seed)
        metrics, grads = ours.learn(batch)
        loss, their_grads, their_params = theirs.step(batch)
        assert abs(float(metrics.nats) - loss) < 1e-5
        yield seed + 1, grads, their_grads
        yield seed + 1, ours.state.params, their_params


def same(tensors, expected, step):
    """Each tensor is the expected one of its name."""
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-5, rtol=0, err_msg=f"{name}, step {step}")


class Loop:
    """transformers' model, AdamW without decay on norms and biases, clipping, the same schedule.

    lora: adapters (their first values in `start`) are added to the outputs of linear layers, and they alone are trained.
    routers: (balance, z_loss), the coefficients of what routers of experts learn.
    """

    def __init__(self, folder, settings, *, lora=None, start=None, routers=None):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.trained = dict(self.model.named_parameters())
        if lora:
            self.model.requires_grad_(False)
            self.trained = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
            for name, layer in self.model.named_modules():
                if f"{name}.lora_A" in start:
                    layer.register_forward_hook(self._adapt(name, lora.alpha / lora.rank))
        plain = [p for n, p in self.trained.items() if "norm" in n or "bias" in n]
        kernels = [p for n, p in self.trained.items() if not ("norm" in n or "bias" in n)]
        groups = [{"params": kernels, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(settings.b1, settings.b2), eps=settings.eps)
        self.scale = lora.alpha / lora.rank if lora else None
        self.settings, self.count, self.routers, self.logits = settings, 0, routers, []
        for layer in self.model.modules() if routers else ():
            if type(layer).__name__.endswith("Router"):
                layer.register_forward_hook(lambda layer, args, out: self.logits.append(out[0]))

    def _adapt(self, name, scale):
        a, b = self.trained[f"{name}.lora_A"], self.trained[f"{name}.lora_B"]
        return lambda layer, args, out: out + scale * (args[0] @ a.T) @ b.T

    def _routers(self, segment_ids):
        """transformers' load-balancing loss, and the mean of log² Z."""
        if not self.routers:
            return 0.0
        config, balance, z, logits = self.model.config, *self.routers, tuple(self.logits)
        self.logits.clear()
        there = None if segment_ids is None else (segment_ids != 0).long()
        experts = getattr(config, "num_experts", None) or config.num_local_experts
        family = importlib.import_module(type(self.model).__module__)
        aux = family.load_balancing_loss_func(logits, experts, config.num_experts_per_tok, there)
        log_z = torch.logsumexp(torch.stack(logits), dim=-1)
        count = torch.ones_like(log_z) if there is None else there.flatten().expand_as(log_z)
        return balance * aux + z * (log_z**2 * count).sum() / count.sum()

    def _experts(self):
        """Kernels of experts, which transformers holds together, with their adapters added."""
        found = {}
        for name, kernel in self.model.named_parameters() if self.scale else ():
            at, _, kind = name.rpartition(".")
            if at.endswith(".experts") and f"{at}.0.up_proj.lora_A" in self.trained:
                parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                pairs = [[[self.trained[f"{at}.{e}.{p}.lora_{m}"] for m in "AB"] for p in parts] for e in range(len(kernel))]
                found[name] = kernel + self.scale * torch.stack([torch.cat([b @ a for a, b in each]) for each in pairs])
        return found

    def step(self, batch):
        """(nats, gradients, parameters after the step), the latter by the names of transformers."""
        count, settings = self.count, self.settings
        warm, total = settings.warmup_steps, 20
        share = (count - warm) / (total - warm)
        cosine = settings.final_learning_rate + (1 - settings.final_learning_rate) * 0.5 * (1 + np.cos(np.pi * share))
        rate = settings.learning_rate * ((count + 1) / warm if count < warm else cosine)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tensors = {k: torch.tensor(v) for k, v in batch.items()}
        T = tensors["tokens"].shape[1]
        seen = torch.ones(T, T).tril().bool()[None]
        if "segment_ids" in tensors:
            seen = seen & (tensors["segment_ids"][:, :, None] == tensors["segment_ids"][:, None, :])
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None].expand(len(tensors["tokens"]), 1, T, T)
        window = getattr(self.model.config, "sliding_window", None)
        if window and getattr(self.model.config, "layer_types", None):  # a mask for each type of layers
            near = torch.where(torch.ones(T, T).triu(1 - window).bool(), mask, torch.finfo(torch.float32).min)
            mask = {"full_attention": mask, "sliding_attention": near}
        inputs = {"input_ids": tensors["tokens"].long(), "attention_mask": mask, "position_ids": tensors["positions"].long()}
        out = torch.func.functional_call(self.model, self._experts(), kwargs={**inputs, "use_cache": False})
        nats = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1), tensors["labels"].long().flatten(), reduction="none"
        ).reshape(tensors["labels"].shape)
        loss = (nats * tensors["weights"]).sum() / tensors["weights"].sum()
        self.optimizer.zero_grad()
        (loss + self._routers(tensors.get("segment_ids"))).backward()
        grads = {n: p.grad.numpy().copy() for n, p in self.trained.items()}
        torch.nn.utils.clip_grad_norm_(self.trained.values(), settings.clip_norm)
        self.optimizer.step()
        self.count += 1
        return float(loss.detach()), grads, {n: p.detach().numpy() for n, p in self.trained.items()}
