"""Run by a Python that has transformer_lens, with a model folder: writes its activations into reference.pt there."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
from transformers import GPT2LMHeadModel

SUFFIXES = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_pattern", "hook_pre", "hook_post", "hook_embed")
SUFFIXES += ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def main(folder: str) -> None:
    tokens = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(3))
    model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    bridge: Any = TransformerBridge.boot_transformers(folder, hf_model=model, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens)
        _, other = bridge.run_with_cache(tokens.flip(1))

        def zero(z, hook):
            z = z.clone()
            z[:, :, 2] = 0
            return z

        name = "blocks.1.hook_resid_pre"
        ablated = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", zero)])
        patched = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: other[name])])
        head, norm = model.lm_head.weight, model.transformer.ln_f
        direction = (head[5] - head[7]) * norm.weight
        _, one = bridge.run_with_cache(tokens[:1])
        heads = [one[f"blocks.{i}.attn.hook_z"][0, -1] for i in range(len(model.transformer.h))]
        weights = [block.attn.c_proj.weight for block in model.transformer.h]  # (H * D, C)
        results = torch.cat(
            [torch.einsum("hd,hdc->hc", z, w.view(*z.shape, -1)) for z, w in zip(heads, weights, strict=True)]
        )
        mlps = torch.stack([one[f"blocks.{i}.hook_mlp_out"][0, -1] for i in range(len(heads))])
        scale = one["ln_final.hook_scale"][0, -1]

        def attribute(parts):
            return (parts - parts.mean(-1, keepdim=True)) / scale @ direction

    found = {name: value for name, value in cache.items() if name.endswith(SUFFIXES) and not name.endswith("_in")}
    known = {name: value for name, value in found.items() if ".ln" not in name}
    out = {"logits": logits, "activations": known, "ablated": ablated, "patched": patched}
    torch.save(out | {"heads": attribute(results), "mlps": attribute(mlps)}, Path(folder) / "reference.pt")


if __name__ == "__main__":
    main(sys.argv[1])
