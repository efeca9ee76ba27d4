"""Print the embeddings that PyTorch computes for sentences, to compare llama-server's with.

    python tests/reference.py MODEL_DIR < sentences.json > embeddings.json

To be run by a Python that has torch and transformers: the converter's own environment. MODEL_DIR
is all-MiniLM-L6-v2 as a Hugging Face folder; input is a JSON list of strings, output a JSON list
of lists of numbers. Written without sentence-transformers, which the converter does not need:
its modules.json for this model is a mean over the tokens, then a normalisation.
"""

import json
import os
import sys

# Read by transformers when it is imported: a wrong path is an error, never a download.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModel, AutoTokenizer


def embed(model_dir: str, sentences: list[str]) -> list[list[float]]:
    """Return one vector of length 1 per sentence."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    # Padding makes the batch rectangular and must not count.
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(mean, dim=1).tolist()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/reference.py MODEL_DIR < sentences.json > embeddings.json")
    json.dump(embed(sys.argv[1], json.load(sys.stdin)), sys.stdout)
