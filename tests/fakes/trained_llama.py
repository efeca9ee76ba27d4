"""A small Llama of 2.9 M parameters that was trained on llama.cpp's documents for a minute or two:
its predictions mean something, so that what a quant loses can be measured.

`make` is called by the tests, and runs this file with the converter's Python, which has torch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 256, 768, 3, 4, 2
VOCAB, CONTEXT = 1024, 512
STEPS, BATCH, LENGTH, RATE = 300, 4, 256, 3e-3
TOKENS = "tokens.npy"


def make(folder: Path, python: Path, text: str) -> None:
    """Train it on `text` into `folder`, with the Python of the converter's environment."""
    import numpy as np
    import sentencepiece
    from fakes import tiny_llama

    folder.mkdir(parents=True)
    tokenizer = folder / "tokenizer.model"
    with tokenizer.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCAB,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            byte_fallback=True,
            control_symbols=list(tiny_llama.SPECIAL[3:]),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            num_threads=1,
            minloglevel=2,
            max_sentence_length=100_000,
        )
    for name, content in tiny_llama.configs("f16").items():
        tiny_llama.write_json(folder / name, content | sizes(name))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    np.save(folder / TOKENS, np.array(processor.encode(text), dtype=np.int64))
    command = [python, __file__, folder]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / TOKENS).unlink()


def sizes(name: str) -> dict[str, Any]:
    """What its config.json says otherwise than that of the tiny Llama."""
    if name == "tokenizer_config.json":
        return {"model_max_length": CONTEXT}
    if name != "config.json":
        return {}
    return {
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": CONTEXT,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
    }


def train(folder: Path) -> None:
    """Train with torch, and write the weights as float16."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a busy machine several mostly wait for each other
    tokens = torch.from_numpy(np.load(folder / TOKENS))
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(STEPS):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: {loss.item():.3f} nats a token", flush=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    train(Path(sys.argv[1]))
