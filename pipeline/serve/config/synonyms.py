"""Names of options in other programs: llama.cpp, vLLM, Ollama, LM Studio, SGLang, TGI and others.

Each row has one meaning: llama-server's option, vLLM's (- where it has none), and what others call
it. The `--help` of the program that will run comes first: its own names are not looked up here.
"""

from __future__ import annotations

from collections.abc import Collection

from pipeline.serve.server import LLAMA_CPP

ROWS = """
ctx-size max-model-len c n-ctx num-ctx ctx ctx-len context context-length context-size
  context-window contextsize max-context-length max-ctx max-ctx-size max-seq-len max-seq-length
  max-sequence-length max-total-tokens model-max-length max-model-length
parallel max-num-seqs np n-parallel num-parallel slots n-slots num-slots max-concurrent-requests
  max-running-requests concurrency max-batch-requests
batch-size max-num-batched-tokens b n-batch num-batch batch max-batch-tokens max-batch-size
  max-batch-prefill-tokens chunked-prefill-size prefill-chunk-size blasbatchsize
ubatch-size - n-ubatch ubatch micro-batch-size physical-batch-size
gpu-layers - ngl n-gpu-layers n-gpu-layer num-gpu-layers num-gpu ngpu-layers gpulayers n-layers
  offload-layers gpu-offload gpu-layer
threads - t n-threads num-thread num-threads cpu-threads nthreads thread thread-count
  omp-num-threads
threads-batch - n-threads-batch num-threads-batch
host host server-host listen listen-address bind bind-address bind-host ip hostname address
port port server-port http-port listen-port bind-port
alias served-model-name a model-alias model-name served-name served-model api-model-name
api-key-file - key-file api-keys-file
api-key api-key api-token auth-token auth-key token
gpu-layers-draft - n-gpu-layer-draft
split-mode - multi-gpu-mode
tensor-split tensor-parallel-size tp tp-size tensor-parallel num-shard n-gpus
main-gpu - gpu-id device-id
device - dev devices
- pipeline-parallel-size pp pp-size
- data-parallel-size dp dp-size
flash-attn attention-backend flash-attention use-flash-attn use-flash-attention fa
cache-type-k kv-cache-dtype cache-type kv-cache-type type-k ctk quantkv kv-dtype kv-cache-quant
cache-type-v kv-cache-dtype type-v ctv
- gpu-memory-utilization gpu-memory-fraction mem-fraction-static cuda-memory-fraction gpu-memory
  gpu-memory-limit gpu-mem-util
fit-target - gpu-overhead
kv-offload - offload-kqv no-kv-offload
n-cpu-moe cpu-offload-gb cpu-offload moecpu
load-mode - use-mmap use-mlock
chat-template chat-template template conv-template prompt-template chat-format
chat-template-kwargs default-chat-template-kwargs template-kwargs
jinja - use-jinja
mmproj - clip-model-path projector mmproj-path vision-projector
model-draft speculative-config draft-model speculative-model speculative-draft-model-path
spec-draft-n-max speculative-config num-speculative-tokens num-pred-tokens
lora lora-modules adapter adapters lora-path lora-paths lora-adapter lora-adapters
n-predict override-generation-config max-tokens max-new-tokens num-predict max-output-tokens
temp override-generation-config temperature
seed seed random-seed
rope-freq-base hf-overrides rope-theta ropeconfig
embeddings runner embedding embedding-mode is-embedding embed
reranking runner rerank reranker
pooling pooler-config pooling-type pooling-method
cache-prompt enable-prefix-caching prefix-caching prompt-caching prompt-cache
cont-batching - continuous-batching
cache-reuse - n-cache-reuse
reasoning-format reasoning-parser
- tool-call-parser tool-parser
- enable-auto-tool-choice auto-tool-choice
- trust-remote-code trust-code
- enforce-eager disable-cuda-graph eager
- dtype torch-dtype weight-dtype
- quantization quant quantize load-in-4bit load-in-8bit
api-prefix root-path url-prefix base-path path-prefix
ssl-cert-file ssl-certfile ssl-cert tls-cert certfile
ssl-key-file ssl-keyfile ssl-key tls-key keyfile
cors-origins allowed-origins cors cors-allow-origins cors-allow-origin origins
metrics - enable-metrics prometheus
verbosity uvicorn-log-level log-level loglevel
timeout - request-timeout http-timeout server-timeout
sleep-idle-seconds - idle-timeout keep-alive ttl unload-after
model model m model-path model-name-or-path ckpt checkpoint gguf gguf-path gguf-file model-file
hf-repo - huggingface-repo
hf-file - hf-filename
hf-token hf-token hugging-face-hub-token
- revision hf-revision
- download-dir cache-dir download-path
"""

# Keys of the other tables, which are variables too: no options of llama-server.
KEY_ROWS = """
quant quantization quantize q quant-type ftype outtype dtype torch-dtype precision load-in-4bit
  load-in-8bit size target-size model-size bits bpw bits-per-weight target-bpw
revision hf-revision branch commit
filename hf-filename hf-file file
ref hf-model hf-repo-id hf-repo repo-id repo hf model
gpu_ids gpus gpu-ids device-ids cuda-visible-devices
env environment
ready_timeout ready-timeout startup-timeout load-timeout
log_dir log-dir log-folder
"""
# Keys of a profile, whose table of llama-server also names the file.
PROFILE_ROWS = """
hf_filename hf-file filename quantization quantize quant
hf_repo_id hf-repo repo-id hf-model repo
gguf_path gguf gguf-file model-path model-file
model_root model-dir models-root root
"""

# Former options of llama-server, and what replaces them: read from `common/arg.cpp` of the pinned
# llama.cpp and its history; a test compares the table with the real program.
RENAMED = {
    "mmap": "load_mode",
    "no-mmap": "load_mode",
    "mlock": "load_mode",
    "direct-io": "load_mode",
    "no-direct-io": "load_mode",
    "draft": "spec_draft_n_max",
    "draft-n": "spec_draft_n_max",
    "draft-max": "spec_draft_n_max",
    "draft-min": "spec_draft_n_min",
    "draft-n-min": "spec_draft_n_min",
    "spec-ngram-size-n": "spec_ngram_mod_n_match",
    "spec-ngram-size-m": "spec_ngram_simple_size_m",
    "spec-ngram-min-hits": "spec_ngram_simple_min_hits",
}


def _rows(text: str) -> list[list[str]]:
    """The words of each row; an indented line goes on with the row before it."""
    return [row.split() for row in text.strip().replace("\n  ", " ").splitlines()]


# By each name: what llama-server and vLLM call it; the first row wins.
MEANINGS = {
    name: (row[0].strip("-"), row[1].strip("-")) for row in reversed(_rows(ROWS)) for name in row
}
KEYS = {name: row[0] for row in _rows(KEY_ROWS) for name in row if "_" not in name}
OF_A_PROFILE = {name: row[0] for row in _rows(PROFILE_ROWS) for name in row[1:]}


def option(name: str, engine: str, known: Collection[str] = ()) -> str | None:
    """The option of `engine` for what other programs call `name`: empty where it has none, None
    where the name is not known. `known` are the options of `engine`; empty: not known."""
    if name not in MEANINGS:
        return None
    meant = MEANINGS[name][engine != LLAMA_CPP]
    return meant if not known or meant in known else ""
