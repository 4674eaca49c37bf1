"""A small model trained from nothing on the bundled texts, to compare quantizers on real weights.

    python -m serve_app.quantize.train_small --output FOLDER [--device cuda] [--minutes 8]

About 27 million weights, a Llama of 8 layers of 512 over a byte-level vocabulary of 2,048 that is
trained first. Nine tenths of both texts are learnt, the last tenth of each is held out and written
as `held_out.txt` beside the model, for `xeray eval --text`. Everything is decided by --seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from serve_app.core.errors import XeRayError
from serve_app.quantize.texts import CALIBRATION_TEXT, EVALUATION_TEXT, bundled_text

VOCABULARY = 2048
CONTEXT = 256
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
_END = "<|endoftext|>"
_HELD_OUT = 0.1


def main() -> int:
    """Train within the time and save; prints losses as it goes."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="at most so long")
    parser.add_argument("--steps", type=int, default=1500, help="at most so many")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1, help="of attention")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        train(options)
    except XeRayError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


def split_texts() -> tuple[str, str]:
    """Return what is learnt and what is held out."""
    learnt, held = [], []
    for name in (CALIBRATION_TEXT, EVALUATION_TEXT):
        text = bundled_text(name)
        cut = text.rindex("\n\n", 0, int(len(text) * (1 - _HELD_OUT)))
        learnt.append(text[:cut])
        held.append(text[cut:].strip() + "\n")
    return "\n\n".join(learnt), "\n\n".join(held)


def train_tokenizer(text: str, folder: Path) -> list[int]:
    """Train and save the vocabulary; return the ids of `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return list(tokenizer.encode(text).ids)


def train(options: argparse.Namespace) -> None:
    """Train with AdamW under a one-cycle schedule and save in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    learnt, held = split_texts()
    (options.output / "held_out.txt").write_text(held, encoding="utf-8")
    ids = torch.tensor(train_tokenizer(learnt, options.output), device=options.device)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=0,
        attention_dropout=options.dropout,
        **SHAPE,
    )
    model = LlamaForCausalLM(config).to(options.device).train()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.1f} M weights, {len(ids)} tokens, {options.device}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps)
    started = time.perf_counter()
    steps = torch.arange(CONTEXT, device=options.device)
    for step in range(options.steps):
        starts = torch.randint(len(ids) - CONTEXT, (options.batch_size, 1), device=options.device)
        batch = ids[starts + steps]
        with torch.autocast(torch.device(options.device).type, torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        minutes = (time.perf_counter() - started) / 60
        if step % 100 == 0 or step == options.steps - 1 or minutes > options.minutes:
            print(f"step {step}: loss {loss.item():.3f}, {minutes:.1f} minutes", flush=True)
        if minutes > options.minutes:
            break
    model.eval().to(torch.bfloat16).save_pretrained(options.output)
    print(f"saved {options.output}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
